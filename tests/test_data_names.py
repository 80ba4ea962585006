"""The rules for class names and labels, applied to every path of the official split files, give the official ones."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from coop.data import load_description, load_split_file
from coop.data.annotations import action_name, year_first

pytestmark = pytest.mark.assets


def rows(assets: Path, name: str) -> Iterator[tuple[str, int, str]]:
    official = load_description(name).official_split
    assert official is not None
    for part in load_split_file(assets / "splits" / official.file).values():
        yield from part


@pytest.mark.parametrize("name", ["caltech101", "dtd", "eurosat"])
def test_class_folders_sorted_and_renamed(assets: Path, name: str) -> None:
    description = load_description(name)
    found = {(path.split("/")[0], label, class_name) for path, label, class_name in rows(assets, name)}
    folders = sorted(folder for folder, _, _ in found)
    assert not set(folders) & set(description.ignore)
    assert found == {(f, label, description.rename.get(f, f)) for label, f in enumerate(folders)}
    assert description.expected.classes == len(folders)


def test_pets_are_named_by_their_files(assets: Path) -> None:
    assert all(name == path.rpartition("_")[0].lower() for path, _, name in rows(assets, "oxford_pets"))


def test_flowers_are_named_by_their_labels(assets: Path) -> None:
    names = json.loads((assets / "splits/cat_to_name.json").read_text())
    assert all(name == names[str(label + 1)] for _, label, name in rows(assets, "oxford_flowers"))


def test_actions_are_named_by_their_videos(assets: Path) -> None:
    odd = {"HandStandPushups": "HandstandPushups"}  # the videos spell this class otherwise than the list of classes
    for path, _, name in rows(assets, "ucf101"):
        action = path.split("/")[1].split("_")[1]
        assert action_name(odd.get(action, action)) == name == path.split("/")[0]


def test_cars_begin_with_the_year(assets: Path) -> None:
    for _, _, name in rows(assets, "stanford_cars"):
        year, *model = name.split(" ")
        assert 1990 < int(year) < 2013 and year_first(" ".join([*model, year])) == name


@pytest.mark.parametrize(
    "name", ["caltech101", "dtd", "eurosat", "oxford_flowers", "oxford_pets", "stanford_cars", "ucf101"]
)
def test_expected_counts_are_those_of_the_official_file(assets: Path, name: str) -> None:
    description = load_description(name)
    assert description.official_split is not None
    split = load_split_file(assets / "splits" / description.official_split.file)
    assert {part: len(of_part) for part, of_part in split.items()} == {
        part: getattr(description.expected, part) for part in ("train", "val", "test")
    }
