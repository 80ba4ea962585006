"""Few-shot samples are CoOp's, and can be written, shared and read back."""

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest

from coop.data import (
    Dataset,
    Split,
    few_shot,
    few_shot_notes,
    few_shot_sample,
    load_split_file,
    read_sample_file,
    write_sample_file,
)
from coop.data.dataset import dataset_digest
from coop.errors import CoopError
from tests.golden.make import SPLIT_FILES


@pytest.mark.assets
@pytest.mark.parametrize("name", SPLIT_FILES)
def test_samples_equal_the_published_ones(assets: Path, name: str) -> None:
    split = load_split_file(assets / "splits" / f"split_zhou_{SPLIT_FILES[name]}.json")
    cases = json.loads((assets / "reference/few_shot_oracle.json").read_text())["cases"][name]
    assert len(cases) == 15
    for case, parts in cases.items():
        shots, seed = (int(word) for word in case.replace("-shot seed", "").split())
        for part, rows in zip(("train", "val"), few_shot_sample(split, shots, seed), strict=True):
            lines = "\n".join("\t".join(map(str, row)) for row in rows)
            assert (len(rows), hashlib.sha256(lines.encode()).hexdigest()) == (
                parts[part]["count"],
                parts[part]["digest"],
            )


def make_dataset() -> Dataset:
    """Return 3 classes, the second first in the list, the last with fewer images than 4 shots."""
    names = ("a", "b", "c")
    labels = [1] * 9 + [0] * 7 + [2] * 3
    train = Split([f"{label}/{i}.jpg" for i, label in enumerate(labels)], labels)
    val = Split([f"{label}/v{i}.jpg" for i, label in enumerate(labels)], labels)
    test = Split(["0/t.jpg", "1/t.jpg"], [0, 1])
    digest = dataset_digest(names, train, val, test)
    return Dataset("mini", Path("/nowhere"), names, train, val, test, "a {}.", "made", digest)


def test_val_continues_the_random_stream_of_train_and_takes_at_most_four() -> None:
    dataset = make_dataset()
    stream = random.Random(7)
    expected = []
    for split, shots in ((dataset.train, 6), (dataset.val, 4)):
        for label in (1, 0, 2):  # order of first appearance
            of_class = [path for path, other in zip(split.paths, split.labels, strict=True) if other == label]
            expected.append(stream.sample(of_class, shots) if len(of_class) >= shots else of_class)
    train, val = few_shot(dataset, 6, 7)
    assert [*train.paths] == expected[0] + expected[1] + expected[2]
    assert [*val.paths] == expected[3] + expected[4] + expected[5]
    assert train.labels == [1] * 6 + [0] * 6 + [2] * 3


def test_dataset_and_split_dict_give_the_same_sample() -> None:
    dataset = make_dataset()
    rows = {
        part: [[path, label, dataset.class_names[label]] for path, label in zip(split.paths, split.labels, strict=True)]
        for part, split in (("train", dataset.train), ("val", dataset.val))
    }
    for shots in (1, 2, 16, "all"):
        from_rows = few_shot_sample(rows, shots, 3)
        from_dataset = few_shot(dataset, shots, 3)
        for one, other in zip(from_rows, from_dataset, strict=True):
            assert [row[0] for row in one] == [*other.paths]


def test_a_short_class_gives_all_and_is_noted() -> None:
    dataset = make_dataset()
    assert few_shot_notes(dataset, 3) == ()
    assert few_shot_notes(dataset, 8, "none") == (
        "2 of 3 classes have fewer than 8 train images and give all: 'a' (7), 'c' (3)",
    )
    assert few_shot_notes(dataset, 5) == (
        "1 of 3 classes have fewer than 5 train images and give all: 'c' (3)",
        "1 of 3 classes have fewer than 4 validation images and give all: 'c' (3)",
    )
    assert few_shot_notes(dataset, 5, "full") == few_shot_notes(dataset, 5, "test") == few_shot_notes(dataset, 5)[:1]


@pytest.mark.parametrize(
    "validation, per_class",
    [("none", (0, 0, 0)), ("min4", (4, 4, 3)), ("shots", (6, 6, 3)), ("full", (7, 9, 3)), ("test", (0, 0, 0))],
)
def test_a_validation_rule_changes_the_validation_sample_alone(validation: str, per_class: tuple[int, ...]) -> None:
    dataset = make_dataset()
    train, val = few_shot(dataset, 6, 7, validation)
    assert train == few_shot(dataset, 6, 7)[0]
    assert tuple(list(val.labels).count(label) for label in range(3)) == per_class
    assert len(set(val.paths)) == len(val), "no image twice, however short a class is"
    assert set(val.paths) <= set(dataset.val.paths)
    assert len(few_shot(dataset, "all", 7, validation)[1]) == (0 if sum(per_class) == 0 else len(dataset.val))


def test_samples_of_shots_per_class_are_equal_min4_up_to_four() -> None:
    dataset = make_dataset()
    for shots in (1, 2, 4):
        assert few_shot(dataset, shots, 3, "shots") == few_shot(dataset, shots, 3, "min4")


@pytest.mark.parametrize("shots", [2, 3, 6, "all"])
def test_one_shot_of_each_class_is_held_out(shots: Any) -> None:
    """Both parts together are the sample of the other rules; the val part is not looked at."""
    dataset = make_dataset()
    whole, _ = few_shot(dataset, shots, 7, "none")
    train, val = few_shot(dataset, shots, 7, "held_out")
    assert sorted([*train.paths, *val.paths]) == sorted(whole.paths) and not set(val.paths) & set(dataset.val.paths)
    assert sorted(val.labels) == sorted(set(whole.labels))
    assert [path for path in whole.paths if path in set(train.paths)] == list(train.paths)
    last = {label: path for path, label in zip(whole.paths, whole.labels, strict=True)}
    assert dict(zip(val.labels, val.paths, strict=True)) == last
    items = zip(dataset.train.paths, dataset.train.labels, strict=True)
    rows = {"train": [[path, label, str(label)] for path, label in items]}
    assert [row[0] for row in few_shot_sample(rows, shots, 7, "held_out")[1]] == list(val.paths)


def test_one_shot_cannot_be_held_out() -> None:
    with pytest.raises(CoopError, match="give shots=2"):
        few_shot(make_dataset(), 1, 7, "held_out")
    lonely = {"train": [["a", 0, "a"], ["b", 1, "b"], ["c", 1, "b"]]}
    assert few_shot_sample(lonely, 2, 1, "held_out")[1][0][1] == 1


def test_an_unknown_validation_rule_is_refused() -> None:
    with pytest.raises(CoopError, match="did you mean 'shots'"):
        few_shot(make_dataset(), 1, 1, "shot")


@pytest.mark.parametrize("shots", [0, -1, True])
def test_shots_that_are_no_number_are_refused(shots: int) -> None:
    with pytest.raises(CoopError, match="shots=.*from 1 on"):
        few_shot_sample({"train": [["a", 0, "a"]], "val": []}, shots, 1)


def test_a_set_without_train_images_cannot_be_sampled() -> None:
    dataset = make_dataset()
    target = Dataset("t", dataset.root, dataset.class_names, Split((), ()), Split((), ()), dataset.test, "{}", "", "")
    with pytest.raises(CoopError, match="only be tested on"):
        few_shot(target, 1, 1)


def test_sample_file_comes_back_and_is_portable(tmp_path: Path) -> None:
    dataset = make_dataset()
    train, val = few_shot(dataset, 2, 1)
    file = tmp_path / "below" / "sample.json"
    write_sample_file(file, train, val, dataset.class_names, dataset="mini", shots=2, seed=1)
    assert read_sample_file(file, dataset) == (train, val)
    content = json.loads(file.read_text())
    assert (content["dataset"], content["shots"], content["seed"]) == ("mini", 2, 1)
    assert str(dataset.root) not in file.read_text()
    assert [path.name for path in file.parent.iterdir()] == ["sample.json"]


@pytest.mark.parametrize(
    "row, fault",
    [
        (["0/t.jpg", 0, "a"], "not in the train part"),
        (["1/0.jpg", 0, "a"], "with that label"),
        (["1/0.jpg", 1, "z"], "not a class"),
        (["../1/0.jpg", 1, "b"], "leaves the image folder"),
        (["1/0.jpg", 1], "must be"),
    ],
)
def test_sample_files_of_other_data_are_refused(tmp_path: Path, row: list[object], fault: str) -> None:
    file = tmp_path / "sample.json"
    file.write_text(json.dumps({"format": "coop few-shot sample 1", "train": [row], "val": []}))
    with pytest.raises(CoopError, match=fault):
        read_sample_file(file, make_dataset())
