"""The few-shot sample as a file, so that a subset can be published, shared and trained on again."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coop.data.content import Row, check_rows
from coop.data.dataset import Dataset, Split
from coop.data.split_file import load_json
from coop.errors import CoopError
from coop.io import atomic_write

FORMAT = "coop few-shot sample 1"


def sample_rows(split: Split, class_names: Sequence[str]) -> list[Row]:
    """Return a split as rows of path, label and class name."""
    return [(path, int(label), class_names[label]) for path, label in zip(split.paths, split.labels, strict=True)]


def write_sample_file(path: Path, train: Split, val: Split, class_names: Sequence[str], **about: Any) -> None:
    """Write the sample as JSON: one image per line, paths relative to the image folder; `about` is kept beside it."""
    write_rows(path, sample_rows(train, class_names), sample_rows(val, class_names), **about)


def write_rows(path: Path, train: Sequence[Row], val: Sequence[Row], **about: Any) -> None:
    """Write rows as a sample file, whole or not at all."""
    head = json.dumps({"format": FORMAT, **about}, indent=1)[:-2]
    parts = [f' "{name}": [\n{_lines(rows)}\n ]' for name, rows in (("train", train), ("val", val))]
    try:
        with atomic_write(path) as partial:
            partial.write_text(head + ",\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
    except OSError as error:
        raise CoopError(f"cannot write {path}: {error.strerror}") from error


def _lines(rows: Sequence[Row]) -> str:
    return ",\n".join(f"  {json.dumps(row, ensure_ascii=False)}" for row in rows)


def read_sample_file(path: Path, dataset: Dataset) -> tuple[Split, Split]:
    """Return the (train, val) that a sample file lists, after checking that `dataset` has them so.

    Raises CoopError for images that are not in the dataset's train (val) part, and for labels or class names that
    differ from the dataset's: a sample that names test images, or another class list, is not trained on.
    """
    content = load_json(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CoopError(f"{path} is not a sample file: 'coop data sample' writes one")
    train, val = (
        _checked(path, part, content.get(part), dataset, whole)
        for part, whole in (("train", dataset.train), ("val", dataset.val))
    )
    if not len(train):
        raise CoopError(f"{path} lists no train images")
    return train, val


def _checked(path: Path, part: str, rows: object, dataset: Dataset, whole: Split) -> Split:
    if not isinstance(rows, list):
        raise CoopError(f"{path}: '{part}' must be a list of [path, label, class name]")
    names = dict(enumerate(dataset.class_names))
    wanted: dict[str, int] = {}
    check_rows(rows, f"{path}: '{part}'")
    for image, label, name in rows:
        if names.get(label) != name:
            raise CoopError(
                f"{path}: '{image}' has label {label!r} and class '{name}', "
                f"which is not a class of dataset '{dataset.name}'"
            )
        wanted[image] = label
    found = {image for image, label in zip(whole.paths, whole.labels, strict=True) if wanted.get(image) == label}
    strange = [image for image in wanted if image not in found]
    if strange:
        raise CoopError(
            f"{path}: {len(strange)} of {len(wanted)} {part} images are not in the {part} part of dataset "
            f"'{dataset.name}' with that label, first '{strange[0]}'"
        )
    return Split([row[0] for row in rows], [row[1] for row in rows])
