"""The vocabulary words nearest to learned context vectors (CoOp, section 4.3; interpret_prompt.py)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from coop.clip.backbone import Backbone
from coop.errors import CoopError, unknown

METRICS = ("euclidean", "cosine")


@dataclass(frozen=True)
class Word:
    """A vocabulary token: its text, whether it ends a word (fragments do not), its id and its distance."""

    text: str
    whole: bool
    token: int
    distance: float


def nearest_words(
    vectors: Float[Tensor, "m d"], backbone: Backbone, k: int = 5, metric: str = "euclidean", whole_words: bool = False
) -> list[list[Word]]:
    """Return the `k` nearest tokens of each vector, nearest first.

    Distances are to the raw token embeddings, without position: Euclidean as in the paper, or 1 - cosine.
    `whole_words` leaves out fragments of words, punctuation and special tokens.
    """
    if metric not in METRICS:
        raise unknown("metric", metric, METRICS)
    table = backbone.token_embedding.float()
    if vectors.shape[-1] != table.shape[1]:
        raise CoopError(
            f"the context vectors are {vectors.shape[-1]} wide, the token embeddings of {backbone.architecture} "
            f"{table.shape[1]}: load the backbone that they were learned on"
        )
    words = _vocabulary(backbone)
    kept = [token for token, (text, whole) in words.items() if not whole_words or (whole and text.isalpha())]
    if not 1 <= k <= len(kept):
        raise CoopError(f"top={k}: give a number from 1 to {len(kept)}")
    ids = torch.tensor(kept, device=table.device)
    distances = _distances(vectors.to(table.device).float(), table[ids], metric)
    values, order = distances.topk(k, largest=False)
    return [
        [Word(*words[kept[i]], kept[i], float(value)) for i, value in zip(row, near, strict=True)]
        for row, near in zip(order.tolist(), values.tolist(), strict=True)
    ]


def _distances(vectors: Tensor, table: Tensor, metric: str) -> Tensor:
    if metric == "cosine":
        return 1 - F.normalize(vectors, dim=-1) @ F.normalize(table, dim=-1).T
    return torch.cdist(vectors, table, compute_mode="donot_use_mm_for_euclid_dist")


def _vocabulary(backbone: Backbone) -> Mapping[int, tuple[str, bool]]:
    """Return {token id: (text, whether it ends a word)}."""
    tokenizer: Any = backbone.tokenizer
    if hasattr(tokenizer, "byte_decoder"):  # open_clip's own byte-pair tokenizer
        return {token: _readable(entry, tokenizer.byte_decoder) for token, entry in tokenizer.decoder.items()}
    hub = getattr(tokenizer, "tokenizer", None)
    if hub is None or not hasattr(hub, "convert_ids_to_tokens"):
        raise CoopError(f"the words of a {type(tokenizer).__name__} cannot be listed: only open_clip's tokenizers' can")
    size = min(len(hub), len(backbone.token_embedding))
    tokens = hub.convert_ids_to_tokens(list(range(size)))
    return {i: (str(token).lstrip("▁Ġ"), str(token).startswith(("▁", "Ġ"))) for i, token in enumerate(tokens)}


def _readable(entry: str, byte_decoder: Mapping[str, int]) -> tuple[str, bool]:
    """Undo the byte-level spelling: 'Ã¼</w>' is 'ü'."""
    whole = entry.endswith("</w>")
    letters = entry.removesuffix("</w>")
    if not all(letter in byte_decoder for letter in letters):
        return entry, False  # <start_of_text> and the like
    return bytearray(byte_decoder[letter] for letter in letters).decode("utf-8", errors="backslashreplace"), whole
