"""What a dataset is to the rest of the toolkit: class names, and image paths with labels in three parts."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from coop.errors import CoopError

PARTS = ("train", "val", "test")
ENCODING = "utf-8", "surrogateescape"  # a file name that is not UTF-8 survives
OUTSIDE = re.compile(r"^[/\\]|^[A-Za-z]:[/\\]|(^|[/\\])\.\.([/\\]|$)")
CONTROL = re.compile("[\x00-\x1f\x7f\x85\u2028\u2029\ud800-\udc7f\udd00-\udfff]")  # and what no file name can hold


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

    def part(self, name: str) -> Split:
        """Return the part called train, val or test."""
        return {"train": self.train, "val": self.val, "test": self.test}[name]


def dataset_digest(class_names: Sequence[str], train: Split, val: Split, test: Split) -> str:
    """Return the sha256 over all parts' paths, labels and class names, in order.

    Paths and labels are hashed as blocks, so that 1.3 million of them take a fraction of a second.
    """
    whole = hashlib.sha256(json.dumps(list(class_names)).encode())
    for part in (train, val, test):
        whole.update(hashlib.sha256(joined(part.paths)).digest())
        whole.update(hashlib.sha256(np.asarray(part.labels, dtype="<i4").tobytes()).digest())
    return whole.hexdigest()


def joined(paths: Sequence[str]) -> bytes:
    """Return the paths as one block of bytes, joined by newlines."""
    return "\n".join(paths).encode(*ENCODING)


def shortened(value: object) -> str:
    """Return a value as an error shows it: on one line, at most 100 characters."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:80]}...{text[-10:]}"


def path_fault(path: object) -> str | None:
    """Return what is wrong with `path` as a path inside a folder, or None."""
    if not isinstance(path, str) or not path.strip():
        return f"{shortened(path)} is not a path"
    if OUTSIDE.search(path):
        return f"the path {shortened(path)} leaves the image folder"
    return f"the path {shortened(path)} contains a control character" if CONTROL.search(path) else None


def is_class_name(name: object) -> bool:
    """Tell whether `name` is a text of one line that is not blank."""
    return type(name) is str and bool(name.strip()) and not CONTROL.search(name)


def leaves(root: str, path: str) -> bool:
    """Tell whether `path`, with every symbolic link followed, lies outside `root` (itself a real path)."""
    real = os.path.realpath(path)
    return real != root and not real.startswith(root.rstrip(os.sep) + os.sep)


def check_folders_inside(root: Path, paths: Iterable[str], source: str) -> None:
    """Raise CoopError if a folder of `paths` is a symbolic link out of `root`; files are `check_images`'s work.

    Only folders are looked at here, some hundred instead of some hundred thousand.
    """
    real_root = os.path.realpath(root)
    for folder in sorted({os.path.dirname(path) for path in paths}):
        if leaves(real_root, os.path.join(root, folder)):
            raise CoopError(
                f"{source}: the folder {shortened(folder)} is a symbolic link that leaves {root}; "
                "if the link is your own, set dataset.follow_links=true"
            )
