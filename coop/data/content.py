"""What a reader hands over: class names and parts, and the checks that every source of them goes through."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from coop.data.dataset import EMPTY, Split
from coop.data.paths import ODD, OUTSIDE, path_fault, shortened
from coop.errors import CoopError

PARTS = ("train", "val", "test")
Row = tuple[str, int, str]  # path, label, class name


@dataclass(frozen=True)
class Content:
    """A dataset's parts before it has a name, a template and a digest."""

    class_names: list[str]
    parts: Mapping[str, Split]  # any of train, val, test
    split_source: str
    notes: list[str] = field(default_factory=list)
    follow_links: bool = False
    val_is_test: bool = False

    def part(self, name: str) -> Split:
        """Return the part, empty if the reader gave none."""
        return self.parts.get(name, EMPTY)


def split_of(rows: Sequence[Row]) -> Split:
    """Return rows as paths and labels."""
    return Split([row[0] for row in rows], [row[1] for row in rows])


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
                raise CoopError(f"{source}: label {label} has two class names, '{names[label]}' and '{name}'")
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
    """Raise CoopError for a row that is no [path inside the folder, label from 0 on, class name].

    One plain loop, since a split has up to a hundred thousand rows.
    """
    for number, row in enumerate(rows):
        if not isinstance(row, (list, tuple)) or len(row) != 3:
            raise CoopError(f"{where}, item {number} must be [path, label, class name], not {shortened(row)}")
        path, label, name = row
        if type(path) is not str or not path.strip() or OUTSIDE.search(path) or ODD.search(path):
            raise CoopError(f"{where}, item {number}: {path_fault(path)}")
        if type(label) is not int or label < 0:
            raise CoopError(f"{where}, item {number}: {shortened(label)} is not a label")
        if type(name) is not str or not name.strip() or ODD.search(name):
            raise CoopError(f"{where}, item {number}: {shortened(name)} is not a class name")


def check_distinct(names: Sequence[str], source: str) -> None:
    """Raise CoopError if two classes have one name, since no prompt could tell them apart."""
    for name, count in Counter(names).items():
        if count > 1:
            labels = [str(label) for label, other in enumerate(names) if other == name]
            raise CoopError(
                f"{source}: labels {', '.join(labels)} are all called '{name}': give each class its own name"
            )


def content_notes(content: Content) -> list[str]:
    """Return what a reader of the results should know: images in two parts, classes that some part lacks."""
    notes = []
    if not content.val_is_test:
        seen = Counter(path for part in PARTS for path in content.part(part).paths)
        repeated = [path for path, count in seen.items() if count > 1]
        if repeated:
            notes.append(f"images listed more than once: {len(repeated)}, first '{repeated[0]}'")
    for part in ("train", "test"):
        lacking = sorted(set(range(len(content.class_names))) - set(content.part(part).labels))
        if lacking and len(content.part(part)):
            notes.append(f"classes without {part} images: {len(lacking)}, first '{content.class_names[lacking[0]]}'")
    return notes
