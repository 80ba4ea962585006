"""A million paths without a million Python objects, and the rule that no path leaves its folder."""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np

from coop.errors import CoopError

ENCODING = "utf-8", "surrogateescape"  # a file name that is not UTF-8 survives
OUTSIDE = re.compile(r"^[/\\]|^[A-Za-z]:[/\\]|(^|[/\\])\.\.([/\\]|$)")
ODD = re.compile("[\x00-\x1f\x7f\ud800-\udc7f\udd00-\udfff]")  # control characters, and what no file name can hold


class CompactPaths(Sequence[str]):
    """A sequence of paths in one block of bytes: about 45 bytes a path, where a list of str needs 100."""

    def __init__(self, block: bytes) -> None:
        """Take the paths joined by newlines; no path may be empty or contain one."""
        self.block = block
        self._ends = np.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")), len(block))
        if not block:
            self._ends = self._ends[:0]

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"path {index} of {len(self)}")
        index %= len(self)
        start = int(self._ends[index - 1]) + 1 if index else 0
        return self.block[start : int(self._ends[index])].decode(*ENCODING)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CompactPaths) and self.block == other.block

    def __iter__(self) -> Iterator[str]:
        start = 0
        for end in self._ends.tolist():
            yield self.block[start:end].decode(*ENCODING)
            start = end + 1


def joined(paths: Sequence[str]) -> bytes:
    """Return the paths as one block, joined by newlines: the same for every kind of sequence."""
    return paths.block if isinstance(paths, CompactPaths) else "\n".join(paths).encode(*ENCODING)


def shortened(value: object) -> str:
    """Return a value as an error shows it, however long it is."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:80]}...{text[-10:]}"


def path_fault(path: object) -> str | None:
    """Return what is wrong with `path` as a path inside a folder, or None."""
    if not isinstance(path, str) or not path.strip():
        return f"{shortened(path)} is not a path"
    if OUTSIDE.search(path):
        return f"the path {shortened(path)} leaves the image folder"
    return f"the path {shortened(path)} contains a control character" if ODD.search(path) else None


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
                f"{source}: the folder '{folder}' is a symbolic link that leaves {root}; "
                "if the link is your own, set dataset.follow_links=true"
            )
