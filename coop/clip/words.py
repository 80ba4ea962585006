"""The vocabulary words nearest to learned context vectors (CoOp, section 4.3; interpret_prompt.py).

Nothing here needs torch or a model: where a backbone's weights are a safetensors file that was loaded before, its token
embeddings are read alone.
"""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError, safe_open

from coop.errors import CoopError, unknown
from coop.io import atomic_write, cache_folder, read_json, write_json

METRICS = ("euclidean", "cosine")
EMBEDDINGS = ("token_embedding.weight", "text.token_embedding.weight")  # in open_clip's checkpoints
LEARNED_FILE = "learned.safetensors"  # in a run's folder
VECTORS_AT_ONCE = 64


@dataclass(frozen=True)
class Word:
    """A vocabulary token: its text, whether it ends a word (fragments do not), its id and its distance."""

    text: str
    whole: bool
    token: int
    distance: float


@dataclass(frozen=True)
class WordTable:
    """A model's token embeddings, and {token id: (text, whether it ends a word)}."""

    architecture: str
    embeddings: Float[np.ndarray, "vocabulary d"]
    words: Mapping[int, tuple[str, bool]]

    @classmethod
    def of(cls, backbone: Any) -> "WordTable":
        """Return the table of a loaded `Backbone`. Raises CoopError for a tokenizer whose words cannot be listed."""
        table = backbone.token_embedding.float().cpu().numpy()
        return cls(backbone.architecture, table, vocabulary_of(backbone.tokenizer, len(table)))


def nearest_words(
    vectors: Any, source: Any, k: int = 5, metric: str = "euclidean", whole_words: bool = False
) -> list[list[Word]]:
    """Return the `k` nearest tokens of each vector (m, d), a tensor or an array; nearest first.

    `source` is a `Backbone` or a `WordTable`.

    Distances are to the raw token embeddings, without position: Euclidean as in the paper, or 1 - cosine.
    `whole_words` leaves out fragments of words, punctuation and special tokens.
    """
    if metric not in METRICS:
        raise unknown("metric", metric, METRICS)
    table = source if isinstance(source, WordTable) else WordTable.of(source)
    array = vectors if isinstance(vectors, np.ndarray) else vectors.detach().cpu().double().numpy()
    if not np.isfinite(array).all():
        raise CoopError("the context vectors hold values that are not finite: the file is damaged, run it again")
    if array.shape[-1] != table.embeddings.shape[1]:
        raise CoopError(
            f"the context vectors are {array.shape[-1]} wide, the token embeddings of {table.architecture} "
            f"{table.embeddings.shape[1]}: load the backbone that they were learned on"
        )
    kept = [token for token, (text, whole) in table.words.items() if not whole_words or (whole and text.isalpha())]
    if not 1 <= k <= len(kept):
        raise CoopError(f"top={k}: give a number from 1 to {len(kept)}")
    embeddings = table.embeddings[kept].astype(np.float64)
    norms = (embeddings**2).sum(axis=1)
    found = []
    for start in range(0, len(array), VECTORS_AT_ONCE):
        some = array[start : start + VECTORS_AT_ONCE].astype(np.float64)
        products = some @ embeddings.T
        # of the squared distance without what is the same for all tokens, or of the cosine
        scores = norms - 2 * products if metric == "euclidean" else -products / np.sqrt(norms)
        for vector, row in zip(some, scores, strict=True):
            few = np.argpartition(row, k - 1)[:k]
            distances = _distances(vector, embeddings[few], metric)
            order = np.argsort(distances, kind="stable")
            near = [(kept[few[i]], float(distances[i])) for i in order]
            found.append([Word(*table.words[token], token, distance) for token, distance in near])
    return found


def _distances(vector: np.ndarray, embeddings: np.ndarray, metric: str) -> np.ndarray:
    if metric == "cosine":
        return 1 - embeddings @ vector / (np.linalg.norm(embeddings, axis=1) * np.linalg.norm(vector))
    return np.linalg.norm(embeddings - vector, axis=1)


def remember_embeddings(backbone: Any, file: Path) -> None:
    """Note, in the cache, that the weights `backbone.identity` are in `file`, so that `find_word_table` finds them.

    Only for float32 models from safetensors files with open_clip's own tokenizer. Failure to write is no error.
    """
    if file.suffix != ".safetensors" or backbone.precision != "fp32" or not hasattr(backbone.tokenizer, "byte_decoder"):
        return
    with suppress(OSError, SafetensorError):
        with safe_open(file, "np") as tensors:
            names = [name for name in EMBEDDINGS if name in tensors.keys()]  # noqa: SIM118 - not a dict
            table = tensors.get_tensor(names[0]).astype(np.float32) if names else None
        if table is None or not np.array_equal(table, backbone.token_embedding.cpu().numpy()):
            return
        status = file.stat()
        words = _folder() / f"{type(backbone.tokenizer).__name__}.json"
        if not words.is_file():
            spelled = vocabulary_of(backbone.tokenizer, len(table))
            with atomic_write(words) as temporary:
                temporary.write_text(json.dumps(list(spelled.items())), encoding="utf-8")
        about: dict[str, Any] = {"architecture": backbone.architecture, "file": str(file.resolve()), "tensor": names[0]}
        about |= {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "words": words.name}
        write_json(_folder() / f"{backbone.identity}.json", about)


def find_word_table(identity: str) -> WordTable | None:
    """Return the table of the weights with this digest, without loading a model; None where that cannot be done."""
    try:
        about = read_json(_folder() / f"{identity}.json")
        status = os.stat(about["file"])
        if (status.st_size, status.st_mtime_ns) != (about["size"], about["mtime_ns"]):
            return None
        words = json.loads((_folder() / about["words"]).read_text(encoding="utf-8"))
        with safe_open(about["file"], "np") as tensors:
            table = tensors.get_tensor(about["tensor"]).astype(np.float32)
        return WordTable(about["architecture"], table, {token: (text, whole) for token, (text, whole) in words})
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None


def read_context(place: Path) -> tuple[np.ndarray, tuple[str, ...], WordTable] | None:
    """Return the context (m, d) or (c, m, d) in a run's folder or learned file, its class names and its word table.

    None where the file holds no such context or the table is not known: then the run and its backbone must be loaded.
    """
    try:
        with safe_open(place / LEARNED_FILE if place.is_dir() else place, "np") as tensors:
            metadata = tensors.metadata() or {}
            ctx = tensors.get_tensor("ctx").astype(np.float32)
        names = tuple(json.loads(metadata["classes"])["names"])
        table = find_word_table(json.loads(metadata["weights"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError):
        return None
    usual = ctx.ndim == 2 or (ctx.ndim == 3 and len(ctx) == len(names))
    return (ctx, names, table) if usual and table is not None else None


def _folder() -> Path:
    return cache_folder() / "embeddings"


def vocabulary_of(tokenizer: Any, size: int) -> dict[int, tuple[str, bool]]:
    """Return {token id: (text, whether it ends a word)}, of the first `size` tokens."""
    if hasattr(tokenizer, "byte_decoder"):  # open_clip's own byte-pair tokenizer; 'Ã¼</w>' stands for 'ü'
        byte_of = tokenizer.byte_decoder.__getitem__
        found: dict[int, tuple[str, bool]] = {}
        for token, entry in tokenizer.decoder.items():
            try:
                spelled = bytes(map(byte_of, entry.removesuffix("</w>")))
                found[token] = spelled.decode("utf-8", errors="backslashreplace"), entry.endswith("</w>")
            except KeyError:  # <start_of_text> and the like
                found[token] = entry, False
        return found
    hub = getattr(tokenizer, "tokenizer", None)
    if hub is None or not hasattr(hub, "convert_ids_to_tokens"):
        raise CoopError(f"the words of a {type(tokenizer).__name__} cannot be listed: only open_clip's tokenizers' can")
    tokens = hub.convert_ids_to_tokens(list(range(min(len(hub), size))))
    return {i: (str(token).lstrip("▁Ġ"), str(token).startswith(("▁", "Ġ"))) for i, token in enumerate(tokens)}
