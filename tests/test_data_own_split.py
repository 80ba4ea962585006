"""Own splits follow the original's rule: applied to the official data, they give every class's official counts."""

from collections import Counter
from pathlib import Path

import pytest

from coop.data import load_split_file
from coop.data.splits import carve_val, three_way


def counts(labels: list[int], *parts: list[int]) -> list[Counter[int]]:
    return [Counter(labels[place] for place in part) for part in parts]


def labels_of(split: dict[str, list[tuple[str, int, str]]], *parts: str) -> list[int]:
    return [label for part in parts for _, label, _ in split[part]]


@pytest.mark.assets
@pytest.mark.parametrize("name", ["Caltech101", "DescribableTextures", "EuroSAT", "OxfordFlowers"])
def test_three_way_counts_are_the_official_ones(assets: Path, name: str) -> None:
    split = load_split_file(assets / "splits" / f"split_zhou_{name}.json")
    labels = labels_of(split, "train", "val", "test")
    names = [str(label) for label in range(max(labels) + 1)]
    official = [Counter(labels_of(split, part)) for part in ("train", "val", "test")]
    assert counts(labels, *three_way(labels, names, seed=1)) == official


@pytest.mark.assets
@pytest.mark.parametrize("name", ["OxfordPets", "StanfordCars", "UCF101"])
def test_carved_counts_are_the_official_ones(assets: Path, name: str) -> None:
    split = load_split_file(assets / "splits" / f"split_zhou_{name}.json")
    labels = labels_of(split, "train", "val")
    official = [Counter(labels_of(split, part)) for part in ("train", "val")]
    assert counts(labels, *carve_val(labels, seed=1)) == official


@pytest.mark.parametrize(
    "images, expected", [(3, (1, 1, 1)), (4, (2, 1, 1)), (5, (2, 1, 2)), (7, (4, 1, 2)), (10, (5, 2, 3))]
)
def test_small_classes_have_something_in_every_part(images: int, expected: tuple[int, int, int]) -> None:
    parts = three_way([0] * images, ["only"], seed=1)
    assert tuple(map(len, parts)) == expected
    assert sorted(place for part in parts for place in part) == list(range(images))
