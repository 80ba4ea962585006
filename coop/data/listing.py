"""Listing folders of class folders: sorted, compact, and kept for the next time where it took long."""

import hashlib
import json
import os
import time
import zipfile
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile

import numpy as np

from coop.data.dataset import Split
from coop.data.images import SUFFIXES
from coop.data.paths import ENCODING, CompactPaths
from coop.errors import CoopError
from coop.io import cache_folder, track

WORTH_KEEPING = 20_000  # files; fewer are listed as fast as a kept listing is checked
SETTLED = 2.0  # seconds: a folder changed later than this before listing may change again within its time stamp
FORMAT = 1
JUNK = ("__MACOSX",)  # what unpacking leaves behind


@dataclass(frozen=True)
class Listing:
    """The images of a folder of class folders; labels index `folders`."""

    folders: list[str]
    split: Split


def class_folders(root: Path, ignore: Sequence[str] = ()) -> list[str]:
    """Return the names of the folders in `root`, sorted, without hidden and ignored ones."""
    try:
        with os.scandir(root) as entries:
            names = [e.name for e in entries if e.name[0] != "." and e.name not in (*JUNK, *ignore) and e.is_dir()]
    except OSError as error:
        raise CoopError(f"cannot list {root}: {error.strerror}") from error
    if any("\n" in name for name in names):
        raise CoopError(f"a folder in {root} has a line break in its name: rename it")
    return sorted(names)


def list_images(root: Path, below: str = "", folders: Sequence[str] | None = None) -> Listing:
    """List root/below/<folder>/*.<image>, folders and files sorted by name; paths are relative to `root`.

    Without `folders`, all that are there. Takes the kept listing if no folder has changed since.
    """
    place = root / below
    folders = class_folders(place) if folders is None else list(folders)
    stamps = _time_stamps(place, folders)
    kept = _kept_file(place, below, folders)
    found = _load(kept, stamps)
    if found is None:
        found = _list(root, below, folders)
        if found[1].sum() >= WORTH_KEEPING and time.time() - stamps.max() / 1e9 > SETTLED:
            _keep(kept, stamps, *found)
    block, counts = found
    labels = array("i")
    labels.frombytes(np.repeat(np.arange(len(counts), dtype=np.int32), counts).tobytes())
    return Listing(list(folders), Split(CompactPaths(block), labels))


def _list(root: Path, below: str, folders: Sequence[str]) -> tuple[bytes, np.ndarray]:
    """Return all paths joined by newlines, and how many each folder has."""
    blocks, counts = [], []
    prefix = f"{below}/" if below else ""
    for folder in track(folders, f"listing {root / below}", total=len(folders)):
        names = _image_names(root / below / folder)
        if any("\n" in name for name in names):
            raise CoopError(f"an image in {root / below / folder} has a line break in its name: rename it")
        counts.append(len(names))
        if names:
            blocks.append("\n".join(f"{prefix}{folder}/{name}" for name in names).encode(*ENCODING))
    return b"\n".join(blocks), np.asarray(counts, dtype=np.int64)


def _image_names(folder: Path) -> list[str]:
    try:
        return sorted(name for name in os.listdir(folder) if name.lower().endswith(SUFFIXES) and name[0] != ".")
    except OSError as error:
        raise CoopError(f"cannot list {folder}: {error.strerror}") from error


def _time_stamps(place: Path, folders: Sequence[str]) -> np.ndarray:
    """Return when `place` and each folder in it last changed, in nanoseconds."""
    return np.asarray([os.stat(place / folder).st_mtime_ns for folder in ("", *folders)], dtype=np.int64)


def _kept_file(place: Path, below: str, folders: Sequence[str]) -> Path:
    key = json.dumps([FORMAT, os.path.realpath(place), below, list(folders), SUFFIXES])
    return cache_folder() / "listings" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"


def _load(kept: Path, stamps: np.ndarray) -> tuple[bytes, np.ndarray] | None:
    """Return the kept listing if it is whole and of these time stamps."""
    try:
        with kept.open("rb") as file, np.load(file) as arrays:
            if not np.array_equal(arrays["stamps"], stamps):
                return None
            return arrays["block"].tobytes(), arrays["counts"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _keep(kept: Path, stamps: np.ndarray, block: bytes, counts: np.ndarray) -> None:
    """Keep the listing, whole or not at all; a cache that cannot be written is no error."""
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=kept.parent, suffix=".tmp", delete=False) as file:
            partial = Path(file.name)
            try:
                np.savez(file, stamps=stamps, block=np.frombuffer(block, np.uint8), counts=counts)
                os.replace(partial, kept)
            finally:
                partial.unlink(missing_ok=True)
    except OSError:
        return
