"""What a dataset on disk is worth: counts against the published ones, files that are missing or cannot be read."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from coop.data.content import PARTS
from coop.data.dataset import Dataset, Split
from coop.data.description import Expected
from coop.data.images import file_faults, read_error
from coop.io import track

AT_ONCE = 4096
SHOWN = 10  # faults of a kind that are written out


@dataclass
class Report:
    """The outcome of a check: faults are what a run would stumble over, differences only what it would measure."""

    differences: list[str] = field(default_factory=list)
    faults: dict[str, str] = field(default_factory=dict)  # path -> what is wrong with it


def check_dataset(dataset: Dataset, expected: Expected, decode: bool = True) -> Report:
    """Look for every file of the dataset, decode each (if `decode`), and compare counts with the whole dataset's."""
    report = Report([*_count_differences(dataset, expected)])
    parts = [dataset.train, dataset.test] if dataset.val_is_test else [dataset.train, dataset.val, dataset.test]
    paths: Sequence[str] = [path for part in parts for path in part.paths]
    report.faults = file_faults(dataset.root, paths, dataset.follow_links)
    if decode:
        report.faults |= _unreadable(dataset, [path for path in paths if path not in report.faults])
    return report


def _count_differences(dataset: Dataset, expected: Expected) -> Iterator[str]:
    found = {"classes": len(dataset.class_names)} | {part: len(part_of(dataset, part)) for part in PARTS}
    for name, count in found.items():
        wanted = getattr(expected, name)
        if wanted is not None and count != wanted:
            yield f"{name}: {count} of {wanted}"
    for part, wanted in expected.per_class.items():
        counts = Counter(part_of(dataset, part).labels)
        other = [label for label in range(len(dataset.class_names)) if counts[label] != wanted]
        if other and len(part_of(dataset, part)):
            shown = ", ".join(f"{dataset.class_names[label]} {counts[label]}" for label in other[:SHOWN])
            more = ", ..." if len(other) > SHOWN else ""
            yield f"{part}: {len(other)} classes do not have {wanted} images: {shown}{more}"


def part_of(dataset: Dataset, part: str) -> Split:
    """Return the dataset's part called train, val or test."""
    return {"train": dataset.train, "val": dataset.val, "test": dataset.test}[part]


def _unreadable(dataset: Dataset, paths: Sequence[str]) -> dict[str, str]:
    """Decode every file and return those that fail."""
    errors = track(_read_errors(dataset, paths), "reading images", total=len(paths))
    return {path: error for path, error in zip(paths, errors, strict=True) if error}


def _read_errors(dataset: Dataset, paths: Sequence[str]) -> Iterator[str | None]:
    """Decode on every core, some thousand files at a time, so that a million make no million waiting jobs."""
    with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        for start in range(0, len(paths), AT_ONCE):
            full = (os.path.join(dataset.root, path) for path in paths[start : start + AT_ONCE])
            yield from threads.map(read_error, full)


def class_counts(dataset: Dataset) -> list[tuple[int, str, int, int, int]]:
    """Return (label, class name, train, val, test images) for every class."""
    train, val, test = (Counter(part_of(dataset, part).labels) for part in PARTS)
    return [(i, name, train[i], val[i], test[i]) for i, name in enumerate(dataset.class_names)]
