"""CoOp's few-shot sampling, to the item: the same seed gives the subset that the paper's runs were trained on."""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from coop.data.dataset import Dataset, Split
from coop.errors import CoopError

Shots = int | Literal["all"]
VAL_SHOTS = 4  # CoOp samples min(shots, 4) images per class for validation


def sample_indices(labels: Sequence[int], shots: int, random_stream: random.Random) -> list[int]:
    """Return the places of `shots` items per class, classes in order of first appearance.

    A class with fewer items gives all of them. Follows Dassl's `generate_fewshot_dataset` (repeat=False):
    `random.sample` draws from the places of a class, and what it draws depends only on how many there are.
    """
    places: dict[int, list[int]] = {}
    for place, label in enumerate(labels):
        places.setdefault(label, []).append(place)
    chosen: list[int] = []
    for of_class in places.values():
        chosen += random_stream.sample(of_class, shots) if len(of_class) >= shots else of_class
    return chosen


def _sample(parts: Sequence[Sequence[int]], shots: Shots, seed: int) -> list[list[int]]:
    """Sample `shots` of the first part and min(shots, 4) of the second from one random stream."""
    if shots == "all":
        return [list(range(len(labels))) for labels in parts]
    if not isinstance(shots, int) or isinstance(shots, bool) or shots < 1:
        raise CoopError(f"shots must be a whole number from 1 on, or 'all', not {shots!r}")
    stream = random.Random(seed)
    counts = shots, min(shots, VAL_SHOTS)
    return [sample_indices(labels, count, stream) for labels, count in zip(parts, counts, strict=True)]


def few_shot_sample(
    split: Mapping[str, Sequence[Sequence[Any]]], shots: Shots, seed: int
) -> tuple[list[Sequence[Any]], list[Sequence[Any]]]:
    """Return CoOp's few-shot (train, val) of a split dict, whose parts list `[path, label, class name]`."""
    parts = [list(split["train"]), list(split.get("val", ()))]
    train, val = _sample([[item[1] for item in part] for part in parts], shots, seed)
    return [parts[0][i] for i in train], [parts[1][i] for i in val]


def few_shot(dataset: Dataset, shots: Shots, seed: int) -> tuple[Split, Split]:
    """Return CoOp's few-shot (train, val) of `dataset`.

    Where `dataset.val_is_test` the second part holds test images, as in the original: use it to look, not to tune.
    """
    if not len(dataset.train):
        raise CoopError(f"dataset '{dataset.name}' has no train images: it can only be tested on")
    if shots == "all":
        return dataset.train, dataset.val
    train, val = _sample([dataset.train.labels, dataset.val.labels], shots, seed)
    return dataset.train.subset(train), dataset.val.subset(val)


def few_shot_notes(dataset: Dataset, shots: Shots) -> tuple[str, ...]:
    """Return a note on the classes that have fewer train images than `shots`, if there are any."""
    if shots == "all":
        return ()
    counts = Counter(dataset.train.labels)
    short = [f"'{name}' ({counts[label]})" for label, name in enumerate(dataset.class_names) if counts[label] < shots]
    if not short:
        return ()
    more = f" and {len(short) - 5} more" if len(short) > 5 else ""
    return (
        f"{len(short)} of {len(dataset.class_names)} classes have fewer than {shots} train images and give all: "
        f"{', '.join(short[:5])}{more}",
    )
