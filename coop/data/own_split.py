"""The original's rules for making a split where there is none, from a seed of their own."""

import random
from collections.abc import Sequence

from coop.errors import CoopError

TRAIN_SHARE, VAL_SHARE = 0.5, 0.2  # CoOp's DTD.read_and_split_data; the rest is test
CARVED_SHARE = 0.2  # CoOp's OxfordPets.split_trainval


def _places(labels: Sequence[int]) -> dict[int, list[int]]:
    places: dict[int, list[int]] = {}
    for place, label in enumerate(labels):
        places.setdefault(label, []).append(place)
    return places


def three_way(labels: Sequence[int], class_names: Sequence[str], seed: int) -> tuple[list[int], list[int], list[int]]:
    """Return the places of train, val and test: 50/20/30 of every class, shuffled.

    A class of three or more has at least one in each part; the original only asserts that.
    """
    stream = random.Random(seed)
    train: list[int] = []
    val: list[int] = []
    test: list[int] = []
    for label, places in _places(labels).items():
        total = len(places)
        if total < 3:
            raise CoopError(
                f"class '{class_names[label]}' has {total} image{'s' * (total > 1)}, but an own split needs 3: "
                "add images or make the folders train, val and test yourself"
            )
        stream.shuffle(places)
        n_val = max(1, round(total * VAL_SHARE))
        n_train = min(max(1, round(total * TRAIN_SHARE)), total - n_val - 1)
        train += places[:n_train]
        val += places[n_train : n_train + n_val]
        test += places[n_train + n_val :]
    return train, val, test


def carve_val(labels: Sequence[int], seed: int) -> tuple[list[int], list[int]]:
    """Return the places of train and val: 20 % of every class become val; a class of one or two keeps all."""
    stream = random.Random(seed)
    train: list[int] = []
    val: list[int] = []
    for places in _places(labels).values():
        stream.shuffle(places)
        n_val = round(len(places) * CARVED_SHARE)
        val += places[:n_val]
        train += places[n_val:]
    return train, val


def own_split(rule: str, seed: int) -> str:
    """Return how an own split is named in results."""
    return f"own split: {rule}, seed {seed}"


THREE_WAY_RULE = "50/20/30 of every class"
CARVED_RULE = "val is 20 % of every class of the official train part"
