"""CoOp's few-shot sampling, to the item, and the rules for the validation sample beside it."""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from coop.data.dataset import Dataset, Split
from coop.errors import CoopError, unknown

Shots = int | Literal["all"]
HELD_OUT = "held_out"
VALIDATIONS = ("none", "min4", "shots", "full", HELD_OUT, "test")
MIN4 = 4  # CoOp samples min(shots, 4) images per class for validation


def check_validation(name: str) -> str:
    """Return `name` if it is a validation rule; raise CoopError with the closest match if it is none.

    `none`: no validation images. `min4`: min(shots, 4) per class (CoOp). `shots`: as many per class as for training.
    `full`: the whole val part. `held_out`: one of each class's shots, which then is not trained on: no image beyond the
    shots (HOSO). `test`: no validation images; the run tunes on the test part and says so.
    """
    if name not in VALIDATIONS:
        raise unknown("validation", str(name), VALIDATIONS)
    return name


def few_shot(dataset: Dataset, shots: Shots, seed: int, validation: str = "min4") -> tuple[Split, Split]:
    """Draw a few-shot (train, val) sample of `dataset`; val by the rule `validation` (see `check_validation`).

    The train sample is CoOp's for this seed whatever the rule; `held_out` divides it. A class with fewer images gives
    all of them, each once (`few_shot_notes` says which). Where `dataset.val_is_test`, the second part holds test
    images, as in the original.
    """
    if not len(dataset.train):
        raise CoopError(f"dataset '{dataset.name}' has no train images: it can only be tested on")
    train, val = _sample(dataset.train.labels, dataset.val.labels, shots, seed, validation)
    return (
        dataset.train if train is None else dataset.train.subset(train),
        dataset.val if val is None else (dataset.train if validation == HELD_OUT else dataset.val).subset(val),
    )


def few_shot_sample(
    split: Mapping[str, Sequence[Sequence[Any]]], shots: Shots, seed: int, validation: str = "min4"
) -> tuple[list[Sequence[Any]], list[Sequence[Any]]]:
    """Draw the same sample as `few_shot` from a split dict, whose parts list `[path, label, class name]`."""
    train, val = split["train"], split.get("val", ())
    places = _sample([item[1] for item in train], [item[1] for item in val], shots, seed, validation)
    val = train if validation == HELD_OUT else val
    chosen_train, chosen_val = (
        list(part) if chosen is None else [part[i] for i in chosen]
        for part, chosen in zip((train, val), places, strict=True)
    )
    return chosen_train, chosen_val


def sample_indices(labels: Sequence[int], shots: int, random_stream: random.Random) -> list[int]:
    """Return the places of `shots` items per class, classes in order of first appearance.

    A class with fewer items gives all of them. Follows Dassl's `generate_fewshot_dataset` (repeat=False):
    `random.sample` draws from the places of a class, and what it draws depends only on how many there are.
    """
    chosen: list[int] = []
    for places in places_by_class(labels).values():
        chosen += random_stream.sample(places, shots) if len(places) >= shots else places
    return chosen


def places_by_class(labels: Sequence[int]) -> dict[int, list[int]]:
    """Return {label: places of its items}, labels in order of first appearance."""
    places: dict[int, list[int]] = {}
    for place, label in enumerate(labels):
        places.setdefault(label, []).append(place)
    return places


def few_shot_notes(dataset: Dataset, shots: Shots, validation: str = "min4") -> tuple[str, ...]:
    """Return notes on the classes that have fewer images than the sample takes of each."""
    if shots == "all":
        return ()
    of_val = {"min4": min(shots, MIN4), "shots": shots}.get(validation, 0) if len(dataset.val) else 0
    notes = []
    for part, split, count in (("train", dataset.train, shots), ("validation", dataset.val, of_val)):
        counts = Counter(split.labels)
        short = [f"'{name}' ({counts[i]})" for i, name in enumerate(dataset.class_names) if counts[i] < count]
        if short:
            more = f" and {len(short) - 5} more" if len(short) > 5 else ""
            notes.append(
                f"{len(short)} of {len(dataset.class_names)} classes have fewer than {count} {part} images and give "
                f"all: {', '.join(short[:5])}{more}"
            )
    return tuple(notes)


def _sample(
    train: Sequence[int], val: Sequence[int], shots: Shots, seed: int, validation: str
) -> tuple[list[int] | None, list[int] | None]:
    """Return the places to take from each part, given its labels; None for the whole part.

    Both parts are drawn from one random stream, train first, as in CoOp. `held_out` takes both from the train part: of
    each class that has two images or more the last one drawn is for validation.
    """
    check_validation(validation)
    if shots != "all" and (not isinstance(shots, int) or isinstance(shots, bool) or shots < 1):
        raise CoopError(f"shots={shots!r}: give a whole number from 1 on, or 'all'")
    if seed < 0:  # Python's generator takes -1 for 1
        raise CoopError(f"seed={seed}: give a whole number, 0 or more")
    stream = random.Random(seed)
    chosen_train = None if shots == "all" else sample_indices(train, shots, stream)
    if validation in ("none", "test"):
        return chosen_train, []
    if validation == HELD_OUT:
        if shots == 1:
            raise CoopError("validation=held_out takes one of each class's shots for validation: give shots=2 or more")
        drawn = list(range(len(train))) if chosen_train is None else chosen_train
        of_class = places_by_class([train[i] for i in drawn]).values()
        held_out = {drawn[places[-1]]: None for places in of_class if len(places) > 1}
        return [i for i in drawn if i not in held_out], list(held_out)
    if validation == "full" or shots == "all":
        return chosen_train, None
    return chosen_train, sample_indices(val, min(shots, MIN4) if validation == "min4" else shots, stream)
