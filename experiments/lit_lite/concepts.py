"""Which concepts the text tower learns, how often, and where the image side would put those it has no row for."""

import timm.data
import torch
import torch.nn.functional as F
from jaxtyping import Float
from open_clip import IMAGENET_CLASSNAMES
from torch import Tensor

from experiments.lit_lite.texts import Concept, token_ids
from experiments.lit_lite.wordnet import Synset, ancestors

# How often a topic's concepts are drawn, by how much of them can be seen in a photograph.
TOPICS = {
    "artifact": 1.5, "animal": 0.7, "plant": 0.4, "food": 0.8, "body": 1.0, "object": 1.0, "substance": 1.0,
    "shape": 1.5, "phenomenon": 0.5, "attribute": 0.5, "adj": 0.8,
}  # fmt: skip
IMAGENET_SHARE = 0.25  # of all draws, for the 1,000 concepts with a row of their own
WEIGHTS = {"hierarchy": 0.2, "gloss": 0.5, "name": 0.3}  # chosen on held-out ImageNet classes, see the README
POWER, RIDGE = 2, 0.3


def choose_synsets(synsets: dict[str, Synset]) -> list[str]:
    """Return the keys to learn: all that ImageNet-22k pictures, and other visible nouns and adjectives.

    Names of individuals and Latin genera are left out, unless ImageNet-22k has them.
    """
    pictured = set(timm.data.ImageNetInfo("imagenet-22k").label_names())

    def wanted(synset: Synset) -> bool:
        word = synset.words[0]
        latin = synset.topic in ("plant", "animal") and (word[0].isupper() or word.startswith(("genus ", "family ")))
        return synset.topic in TOPICS and not synset.instance and not latin

    return [key for key, synset in synsets.items() if key in pictured or wanted(synset)]


def imagenet_keys() -> list[str]:
    """Return the synsets of the 1,000 ImageNet classes, in order."""
    return timm.data.ImageNetInfo("imagenet-1k").label_names()


def predict_targets(
    keys: list[str], synsets: dict[str, Synset], sentences: dict[str, Tensor], known: Float[Tensor, "c e"]
) -> tuple[Float[Tensor, "n e"], Float[Tensor, " n"]]:
    """Predict each synset's place on the image side from those of the ImageNet classes; also say how surely.

    Kernel ridge regression; the kernel is a sum of three likenesses: common ancestors in WordNet, and the cosine (to a
    power, which makes it local) of the sentence vectors of the glosses, and of the names. The norm of a prediction
    shrinks as a concept resembles no class, and is returned as the certainty. ImageNet classes keep their own rows.
    """
    index = {key: i for i, key in enumerate(keys)}
    rows = torch.tensor([index[key] for key in imagenet_keys()])
    hierarchy = _ancestor_vectors(keys, synsets)
    classes = torch.stack([hierarchy[int(i)].to_dense() for i in rows])
    kernel = WEIGHTS["hierarchy"] * torch.sparse.mm(hierarchy, classes.T)
    for name, vectors in sentences.items():
        kernel += WEIGHTS[name] * (vectors @ vectors[rows].T) ** POWER
    dual = torch.linalg.solve(kernel[rows] + RIDGE * torch.eye(len(rows)), known)
    predicted = kernel @ dual
    certainty = predicted.norm(dim=-1)
    targets = F.normalize(predicted, dim=-1)
    targets[rows] = known
    return targets, certainty


def _ancestor_vectors(keys: list[str], synsets: dict[str, Synset]) -> Tensor:
    """Return a sparse unit vector per synset: its ancestors, each weighted by how few synsets it has below it."""
    above = [sorted(ancestors(key, synsets)) for key in keys]
    names = sorted({name for line in above for name in line})
    column = {name: i for i, name in enumerate(names)}
    coordinates = torch.tensor([[row, column[name]] for row, line in enumerate(above) for name in line]).T
    below = torch.bincount(coordinates[1], minlength=len(names))
    weights = (len(keys) / below).log().clamp(min=0).sqrt()[coordinates[1]]
    norms = torch.zeros(len(keys)).index_add_(0, coordinates[0], weights**2).sqrt().clamp(min=1e-6)
    return torch.sparse_coo_tensor(coordinates, weights / norms[coordinates[0]], (len(keys), len(names))).coalesce()


def build_concepts(
    keys: list[str], synsets: dict[str, Synset], certainty: Float[Tensor, " n"]
) -> tuple[list[Concept], Float[Tensor, " n"]]:
    """Return the concepts and how often each is drawn: more for visible, certain, common meanings of common words."""
    curated = dict(zip(imagenet_keys(), IMAGENET_CLASSNAMES, strict=True))
    concepts, frequency = [], torch.empty(len(keys))
    sureness = (certainty / certainty.median()).clamp(0.2, 1.5)
    for i, key in enumerate(keys):
        synset = synsets[key]
        concepts.append(_concept(synset, synsets, curated.get(key)))
        common = 2.0 if any(len(token_ids(word)) == 1 for word in synset.words) else 1.0
        frequency[i] = TOPICS.get(synset.topic, 0.5) * sureness[i] * common / (1 + min(synset.ranks))
    is_imagenet = torch.tensor([key in curated for key in keys])
    others = frequency[~is_imagenet].sum()
    frequency[is_imagenet] = others * IMAGENET_SHARE / (1 - IMAGENET_SHARE) / len(curated)
    return concepts, frequency / frequency.sum()


def _concept(synset: Synset, synsets: dict[str, Synset], curated: str | None) -> Concept:
    """Return the words of a synset; the curated ImageNet name counts as often as all others together."""
    weights = [1 / (1 + rank) for rank in synset.ranks]
    words = list(synset.words)
    if curated is not None:
        words.append(curated)
        weights.append(sum(weights))
    return Concept(
        words=tuple(words),
        weights=tuple(weights),
        kinds=tuple(synsets[parent].words[0] for parent in synset.parents if parent in synsets),
        gloss=synset.gloss,
        adjective=synset.topic == "adj",
    )
