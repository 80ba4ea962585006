"""What a dataset is to the rest of the toolkit: class names, and image paths with labels in three parts."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from coop.data.paths import joined


@dataclass(frozen=True)
class Split:
    """One part of a dataset: image paths relative to `Dataset.root`, and a label for each."""

    paths: Sequence[str]
    labels: Sequence[int]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[str, int]:
        return self.paths[index], int(self.labels[index])

    def subset(self, indices: Sequence[int]) -> "Split":
        """Return the items at `indices`, in that order."""
        return Split([self.paths[i] for i in indices], [int(self.labels[i]) for i in indices])


EMPTY = Split((), ())


@dataclass(frozen=True)
class Dataset:
    """A dataset that has been read and checked: labels run 0..c-1 and index `class_names`."""

    name: str
    root: Path
    class_names: tuple[str, ...]
    train: Split
    val: Split
    test: Split
    template: str
    split_source: str  # where the split comes from, e.g. "split_zhou_EuroSAT.json" or "own split: 50/20/30 per class"
    digest: str  # sha256 over every part's (path, label, class name): two equal digests are the same data
    notes: tuple[str, ...] = field(default=())
    follow_links: bool = False  # symbolic links may lead out of `root`: the folder is the user's own arrangement
    val_is_test: bool = False  # ImageNet's protocol: what is tuned on val has seen the test images

    @property
    def own_split(self) -> bool:
        """Whether a part was made here, so that results are not comparable with published ones."""
        return "own split" in self.split_source


def dataset_digest(class_names: Sequence[str], train: Split, val: Split, test: Split) -> str:
    """Return the sha256 over all parts' paths, labels and class names, in order.

    Paths and labels are hashed as blocks, so that 1.3 million of them take a fraction of a second.
    """
    whole = hashlib.sha256(json.dumps(list(class_names)).encode())
    for part in (train, val, test):
        whole.update(hashlib.sha256(joined(part.paths)).digest())
        whole.update(hashlib.sha256(np.asarray(part.labels, dtype="<i4").tobytes()).digest())
    return whole.hexdigest()
