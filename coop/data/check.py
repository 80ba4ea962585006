"""What a dataset on disk is worth: counts against the published ones, files that are missing or cannot be read."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from coop.data.dataset import PARTS, Dataset
from coop.data.images import SHOWN, file_faults, read_error
from coop.data.layouts import bundled_sample, read_dataset
from coop.data.spec import DatasetSpec, Expected, dataset_folder
from coop.errors import CoopError
from coop.io import track

AT_ONCE = 4096
GIVEN_BY = {"csv": "dataset.file=CSV", "hub": "dataset.source=torchvision:NAME"}


@dataclass
class DatasetCheck:
    """The outcome of a check: faults are what a run would stumble over, differences only what it would measure."""

    differences: list[str] = field(default_factory=list)
    faults: dict[str, str] = field(default_factory=dict)  # path -> what is wrong with it


def check_dataset(dataset: Dataset, expected: Expected, decode: bool = True) -> DatasetCheck:
    """Look for every file of the dataset, decode each (if `decode`), and compare counts with the whole dataset's."""
    report = DatasetCheck([*_count_differences(dataset, expected)])
    paths = all_paths(dataset)
    report.faults = file_faults(dataset.root, paths, dataset.follow_links)
    if decode:
        there = [path for path in paths if path not in report.faults]
        errors = track(_read_errors(dataset, there), "reading images", total=len(there))
        report.faults |= {path: error for path, error in zip(there, errors, strict=True) if error}
    return report


def all_paths(dataset: Dataset) -> list[str]:
    """Return the paths of all parts; a val part that is the test part is taken once."""
    parts = ("train", "test") if dataset.val_is_test else PARTS
    return [path for part in parts for path in dataset.part(part).paths]


def class_counts(dataset: Dataset) -> list[tuple[int, str, int, int, int]]:
    """Return (label, class name, train, val, test images) for every class."""
    train, val, test = (Counter(dataset.part(part).labels) for part in PARTS)
    return [(i, name, train[i], val[i], test[i]) for i, name in enumerate(dataset.class_names)]


def state(spec: DatasetSpec, data_root: Path) -> list[str]:
    """Return a line about a dataset: name, classes, how many of its images are there, split, licence, folder."""
    if not spec.directory:
        return [spec.name, "", "yours", "", "", GIVEN_BY.get(spec.reader, "dataset.root=FOLDER")]
    folder, sample, classes = dataset_folder(spec, data_root), None, str(spec.expected.classes or "")
    if not folder.is_dir():
        sample = bundled_sample(spec)
        if sample is None:
            return [spec.name, classes, "not there", "", spec.licence, str(folder)]
    end = [spec.licence, str(sample or folder)]
    try:
        dataset = read_dataset(spec, data_root)
    except CoopError:
        return [spec.name, classes, f"not usable: 'coop data check {spec.name}'", "", *end]
    paths = all_paths(dataset)
    here = len(paths) - len(file_faults(dataset.root, paths, dataset.follow_links))
    parts = ("train", "test") if dataset.val_is_test else PARTS
    whole = sum(getattr(spec.expected, part) or 0 for part in parts) or len(paths)
    kind = "changed" if "not the official" in dataset.split_source else "official"
    kind = "sample" if sample else "own split" if dataset.own_split else kind
    return [spec.name, str(len(dataset.class_names)), f"{here} of {whole} images", kind, *end]


def _count_differences(dataset: Dataset, expected: Expected) -> Iterator[str]:
    found = {"classes": len(dataset.class_names)} | {part: len(dataset.part(part)) for part in PARTS}
    for name, count in found.items():
        wanted = getattr(expected, name)
        if wanted is not None and count != wanted:
            yield f"{name}: {count} of {wanted}"
    for part, wanted in expected.per_class.items():
        counts = Counter(dataset.part(part).labels)
        other = [label for label in range(len(dataset.class_names)) if counts[label] != wanted]
        if other and len(dataset.part(part)):
            shown = ", ".join(f"{dataset.class_names[label]} {counts[label]}" for label in other[:SHOWN])
            more = ", ..." if len(other) > SHOWN else ""
            yield f"{part}: {len(other)} classes do not have {wanted} images: {shown}{more}"


def _read_errors(dataset: Dataset, paths: Sequence[str]) -> Iterator[str | None]:
    """Decode on every core, some thousand files at a time, so that a million make no million waiting jobs."""
    with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        for start in range(0, len(paths), AT_ONCE):
            full = (os.path.join(dataset.root, path) for path in paths[start : start + AT_ONCE])
            yield from threads.map(read_error, full)
