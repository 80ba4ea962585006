"""Splits: their rows and checks, CoOp's `split_zhou_*.json`, the rules for making one, and few-shot sample files."""

import hashlib
import json
import os
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from coop.data.dataset import EMPTY, PARTS, Dataset, Split, is_class_name, path_fault, shortened
from coop.data.few_shot import places_by_class
from coop.data.spec import DatasetSpec
from coop.errors import CoopError, first_line, one_line
from coop.io import read_file, write_text

TRAIN_SHARE, VAL_SHARE = 0.5, 0.2  # CoOp's DTD.read_and_split_data; the rest is test
CARVED_SHARE = 0.2  # CoOp's OxfordPets.split_trainval
SAMPLE_FORMAT = "coop few-shot sample 1"

Row = tuple[str, int, str]  # path, label, class name


@dataclass(frozen=True)
class Content:
    """A dataset's parts before it has a name, a template and a digest."""

    class_names: list[str]
    parts: Mapping[str, Split]  # those of train, val and test that are there; train alone is a set in one piece
    split_source: str  # what they were read from; `completed` adds what was made here
    notes: list[str] = field(default_factory=list)
    follow_links: bool = False
    val_is_test: bool = False

    def part(self, name: str) -> Split:
        """Return the part, empty if the reader gave none."""
        return self.parts.get(name, EMPTY)


def content_of(parts: Mapping[str, Sequence[Row]], where: str, split_source: str, same_names: bool = False) -> Content:
    """Return the content of rows, after the checks of `names_of`; `where` begins each error."""
    names = names_of(parts, where, same_names)
    return Content(names, {part: split_of(rows) for part, rows in parts.items()}, split_source)


def split_of(rows: Sequence[Row]) -> Split:
    """Return rows as paths and labels."""
    return Split([row[0] for row in rows], [row[1] for row in rows])


def rows_of(split: Split, class_names: Sequence[str]) -> list[Row]:
    """Return a split as rows of path, label and class name."""
    return [(path, int(label), class_names[label]) for path, label in zip(split.paths, split.labels, strict=True)]


def names_of(parts: Mapping[str, Sequence[Row]], source: str, same_names: bool = False) -> list[str]:
    """Return the class names by label; `source` begins each error.

    Raises CoopError for a bad row (see `check_rows`), one label with two names, one name for two labels (unless
    `same_names`), and a gap in the labels.
    """
    names: dict[int, str] = {}
    for part, rows in parts.items():
        check_rows(rows, f"{source}: '{part}'")
        for _, label, name in rows:
            if names.setdefault(label, name) != name:
                two = f"{shortened(names[label])} and {shortened(name)}"
                raise CoopError(f"{source}: label {label} has two class names, {two}")
    gaps = sorted(set(range(len(names))) - set(names))
    if gaps:
        raise CoopError(
            f"{source}: {len(names)} classes have labels up to {max(names)}, but none has label {gaps[0]}; "
            "labels must run from 0 without a gap"
        )
    ordered = [names[label] for label in range(len(names))]
    if not same_names:
        check_distinct(ordered, source)
    return ordered


def check_rows(rows: Sequence[Any], where: str) -> None:
    """Raise CoopError for a row that is no [path inside the folder, label from 0 on, class name]."""
    for number, row in enumerate(rows):
        if not isinstance(row, (list, tuple)) or len(row) != 3:
            raise CoopError(f"{where}, item {number} must be [path, label, class name], not {shortened(row)}")
        path, label, name = row
        if fault := path_fault(path):
            raise CoopError(f"{where}, item {number}: {fault}")
        if type(label) is not int or label < 0:
            raise CoopError(f"{where}, item {number}: {shortened(label)} is not a label")
        if not is_class_name(name):
            raise CoopError(f"{where}, item {number}: {shortened(name)} is not a class name")


def check_distinct(names: Sequence[str], source: str) -> None:
    """Raise CoopError if two classes have one name, since no prompt could tell them apart."""
    for name, count in Counter(names).items():
        if count > 1:
            labels = [str(label) for label, other in enumerate(names) if other == name][:5]
            called = f"labels {', '.join(labels)} are all called {shortened(name)}"
            raise CoopError(f"{source}: {called}: give each class its own name")


def content_notes(content: Content) -> list[str]:
    """Return what a reader of the results should know: repeated images, classes without images."""
    notes = []
    if not content.val_is_test:
        seen = Counter(path for part in PARTS for path in content.part(part).paths)
        repeated = [path for path, count in seen.items() if count > 1]
        if repeated:
            notes.append(f"images listed more than once: {len(repeated)}, first {shortened(repeated[0])}")
    for part in ("train", "test"):
        lacking = sorted(set(range(len(content.class_names))) - set(content.part(part).labels))
        if lacking and len(content.part(part)):
            first = shortened(content.class_names[lacking[0]])
            notes.append(f"classes without {part} images: {len(lacking)}, first {first}")
    return notes


# The original's rules for making the parts that are not there.


def completed(content: Content, seed: int) -> Content:
    """Return the content with the parts that lack made of those that are there, and `split_source` saying so.

    A set in one piece is split 50/20/30. Without test, val is the test part; without val, 20 % of every class of train
    become it. A set without train images is left as it is: it can be tested on.
    """
    parts, made = dict(content.parts), []
    if set(parts) == {"train"}:
        places = three_way(parts["train"].labels, content.class_names, seed)
        parts = dict(zip(PARTS, map(parts["train"].subset, places), strict=True))
        made.append(f"50/20/30 of every class, seed {seed}")
    if "test" not in parts and "val" in parts:
        parts["test"] = parts.pop("val")
        made.append("val is the test part")
    if "val" not in parts and "train" in parts:
        train, val = map(parts["train"].subset, carve_val(parts["train"].labels, seed))
        parts |= {"train": train, "val": val}
        made.append(f"val is 20 % of every class of train, seed {seed}")
    source = "; ".join(filter(None, [content.split_source, *(f"own split: {rule}" for rule in made)]))
    return replace(content, parts=parts, split_source=source)


def three_way(labels: Sequence[int], class_names: Sequence[str], seed: int) -> tuple[list[int], list[int], list[int]]:
    """Return the places of train, val and test: 50/20/30 of every class, shuffled.

    A class of three or more has at least one in each part; the original only asserts that.
    """
    stream = random.Random(seed)
    train: list[int] = []
    val: list[int] = []
    test: list[int] = []
    for label, places in places_by_class(labels).items():
        total = len(places)
        if total < 3:
            raise CoopError(
                f"class {shortened(class_names[label])} has {total} image{'s' * (total > 1)}, but an own split needs "
                "3: add images or make the folders train, val and test yourself"
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
    for places in places_by_class(labels).values():
        stream.shuffle(places)
        n_val = round(len(places) * CARVED_SHARE)
        val += places[:n_val]
        train += places[n_val:]
    return train, val


# Split files.


def load_json(path: Path) -> Any:
    """Return what a JSON file holds; CoopError if it cannot be read."""
    try:
        return json.loads(read_file(path))
    except OSError as error:
        raise CoopError(f"cannot read {path}: {first_line(error)}") from error
    except (ValueError, RecursionError) as error:
        raise CoopError(f"{path} is not a JSON file: {first_line(error)}") from error


def load_split_file(path: Path) -> dict[str, list[Row]]:
    """Return the rows of a split file by part, in the file's order; raises CoopError for any other shape."""
    content = load_json(path)
    if not isinstance(content, dict) or not {"train", "test"} <= set(content) <= set(PARTS):
        found = one_line(", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__)
        raise CoopError(f"{path} is not a split file: expected the lists train, val and test, found {found}")
    return {part: _checked_rows(path, part, content.get(part, [])) for part in PARTS}


def _checked_rows(path: Path, part: str, rows: object) -> list[Row]:
    """Return the rows of a part of a split or sample file, after `check_rows`."""
    if not isinstance(rows, list):
        raise CoopError(f"{path}: '{part}' must be a list of [path, label, class name], not {type(rows).__name__}")
    check_rows(rows, f"{path}: '{part}'")
    return [(row[0], row[1], row[2]) for row in rows]


def split_text(parts: Mapping[str, Sequence[Sequence[Any]]], **about: Any) -> str:
    """Return the JSON of a split file, or of a sample file with `about` at its head: an item a line, as CoOp has it."""
    entries = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in about.items()]
    for part, rows in parts.items():
        lines = ",\n".join(f"  {json.dumps(row, ensure_ascii=False)}" for row in rows)
        entries.append(f'"{part}": [\n{lines}\n]')
    text = "{\n" + ",\n".join(entries) + "\n}\n"
    return text.encode("utf-8", "backslashreplace").decode()  # JSON's own form of a lone surrogate


def write_split_file(path: Path, parts: Mapping[str, Sequence[Row]]) -> None:
    """Write a split file in CoOp's form, whole or not at all."""
    write_text(path, split_text(parts))


def find_split_file(spec: DatasetSpec, folder: Path) -> Path | None:
    """Return the split file to read: the user's, else the official one, if there is one."""
    if not spec.split_file:
        official = folder / spec.official_split.file if spec.official_split else None
        return official if official and os.path.isfile(official) else None
    path = Path(os.path.expanduser(spec.split_file))
    for candidate in (path, folder / path):
        if os.path.isfile(candidate):
            return candidate
    raise CoopError(f"dataset.split_file={shortened(spec.split_file)}: no such file, here or in {folder}")


def split_source(spec: DatasetSpec, path: Path) -> str:
    """Return the split file's name, marked where it is known not to be the official one."""
    if spec.official_split is None or spec.official_split.sha256 is None:
        return path.name
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest == spec.official_split.sha256:
        return path.name
    return f"{path.name} (not the official file: sha256 {digest[:12]})"


# The few-shot sample as a file, so that a subset can be published, shared and trained on again.


def write_sample_file(path: Path, train: Split, val: Split, class_names: Sequence[str], **about: Any) -> None:
    """Write a few-shot sample as JSON, whole or not at all; `about` is kept at its head."""
    write_text(path, sample_text(rows_of(train, class_names), rows_of(val, class_names), **about))


def sample_text(train: Sequence[Sequence[Any]], val: Sequence[Sequence[Any]], **about: Any) -> str:
    """Return the JSON of a sample file: paths are relative to the image folder."""
    return split_text({"train": train, "val": val}, format=SAMPLE_FORMAT, **about)


def read_sample_file(path: Path, dataset: Dataset) -> tuple[Split, Split]:
    """Return the (train, val) that a sample file lists, after checking that `dataset` has them so.

    Raises CoopError for images that are not in the dataset's train (val) part, and for labels or class names that
    differ from the dataset's: a sample that names test images, or another class list, is not trained on.
    """
    content = load_json(path)
    if not isinstance(content, dict) or content.get("format") != SAMPLE_FORMAT:
        raise CoopError(f"{path} is not a sample file: 'coop data sample' writes one")
    train, val = (_checked_sample(path, part, content.get(part), dataset) for part in ("train", "val"))
    if not len(train):
        raise CoopError(f"{path} lists no train images")
    return train, val


def _checked_sample(path: Path, part: str, content: object, dataset: Dataset) -> Split:
    rows = _checked_rows(path, part, content)
    names, whole = dict(enumerate(dataset.class_names)), dataset.part(part)
    wanted: dict[str, int] = {}
    for image, label, name in rows:
        if names.get(label) != name:
            of_image = f"{shortened(image)} has label {shortened(label)} and class {shortened(name)}"
            raise CoopError(f"{path}: {of_image}, which is not a class of dataset '{dataset.name}'")
        wanted[image] = label
    found = {image for image, label in zip(whole.paths, whole.labels, strict=True) if wanted.get(image) == label}
    strange = [image for image in wanted if image not in found]
    if strange:
        raise CoopError(
            f"{path}: {len(strange)} of {len(wanted)} {part} images are not in the {part} part of dataset "
            f"'{dataset.name}' with that label, first {shortened(strange[0])}"
        )
    return split_of(rows)
