"""Listings of class folders are compact, kept when large, and remade when a folder changed."""

import os
from pathlib import Path

import numpy as np
import pytest

from coop.data import layouts
from coop.data.dataset import CompactPaths, joined
from coop.data.layouts import class_folders, list_images


def touch(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()


def age(root: Path) -> None:
    """Make every folder look as if it had last changed a minute ago."""
    for folder, _, _ in os.walk(root):
        past = os.stat(folder).st_mtime - 60
        os.utime(folder, (past, past))


@pytest.mark.parametrize("paths", [[], ["a"], ["a/1.jpg", "b/ü.jpg", "c/\udcff.jpg"]])
def test_compact_paths_are_a_sequence_of_str(paths: list[str]) -> None:
    compact = CompactPaths(joined(paths))
    assert list(compact) == paths == [compact[i] for i in range(len(compact))]
    assert compact[:2] == paths[:2] and compact[::-1] == paths[::-1]
    assert joined(compact) == joined(paths)
    if paths:
        assert compact[-1] == paths[-1] and paths[0] in compact
    with pytest.raises(IndexError):
        compact[len(paths)]


def test_images_only_sorted_and_labelled_by_folder(tmp_path: Path) -> None:
    touch(tmp_path, "val/b/2.JPEG", "val/b/10.jpg", "val/b/.h.jpg", "val/b/notes.txt", "val/a/x.png", "val/.c/1.jpg")
    found = list_images(tmp_path, "val")
    assert list(found.split.paths) == ["val/a/x.png", "val/b/10.jpg", "val/b/2.JPEG"]
    assert np.asarray(found.split.labels).tolist() == [0, 1, 1]
    assert class_folders(tmp_path / "val") == ["a", "b"]


def test_a_kept_listing_is_used_until_a_folder_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COOP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(layouts, "WORTH_KEEPING", 3)
    root = tmp_path / "images"
    touch(root, "a/1.jpg", "a/2.jpg", "b/1.jpg")
    first = list_images(root)
    kept = list((tmp_path / "cache/listings").glob("*"))
    assert kept == [], "a folder that has just changed may change again unseen"
    age(root)
    assert list(list_images(root).split.paths) == list(first.split.paths)
    (kept_file,) = (tmp_path / "cache/listings").glob("*")
    assert kept_file.suffix == ".npz"
    with np.load(kept_file) as arrays:
        forged = dict(arrays)
    forged["block"] = np.frombuffer(b"a/1.jpg\na/2.jpg\nb/9.jpg", np.uint8)
    np.savez(kept_file, **forged)
    assert list_images(root).split.paths[2] == "b/9.jpg", "the kept listing is what is read"
    touch(root, "b/3.jpg")
    assert list(list_images(root).split.paths) == ["a/1.jpg", "a/2.jpg", "b/1.jpg", "b/3.jpg"]


def test_a_damaged_kept_listing_is_remade(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COOP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(layouts, "WORTH_KEEPING", 1)
    root = tmp_path / "images"
    touch(root, "a/1.jpg")
    age(root)
    list_images(root)
    (kept_file,) = (tmp_path / "cache/listings").glob("*")
    whole = kept_file.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"nonsense"):
        kept_file.write_bytes(damaged)
        assert list(list_images(root).split.paths) == ["a/1.jpg"]
        assert len(kept_file.read_bytes()) == len(whole)


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("COOP_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(layouts, "WORTH_KEEPING", 1)
    touch(tmp_path / "images", "a/1.jpg")
    age(tmp_path / "images")
    assert len(list_images(tmp_path / "images").split) == 1
