"""Listings of class folders are kept when large, and remade when a folder changed."""

import json
import os
from pathlib import Path

import pytest

from coop.data import layouts
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


def test_images_only_sorted_and_labelled_by_folder(tmp_path: Path) -> None:
    touch(tmp_path, "val/b/2.JPEG", "val/b/10.jpg", "val/b/.h.jpg", "val/b/notes.txt", "val/a/x.png", "val/.c/1.jpg")
    found = list_images(tmp_path, "val", ["a", "b"])
    assert found.paths == ["val/a/x.png", "val/b/10.jpg", "val/b/2.JPEG"]
    assert list(found.labels) == [0, 1, 1]
    assert class_folders(tmp_path / "val") == ["a", "b"]


def test_a_kept_listing_is_used_until_a_folder_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COOP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(layouts, "WORTH_KEEPING", 3)
    root = tmp_path / "images"
    folders = ["a", "b"]
    touch(root, "a/1.jpg", "a/2.jpg", "b/1.jpg")
    first = list_images(root, "", folders)
    kept = list((tmp_path / "cache/listings").glob("*"))
    assert kept == [], "a folder that has just changed may change again unseen"
    age(root)
    assert list_images(root, "", folders).paths == first.paths
    (kept_file,) = (tmp_path / "cache/listings").glob("*")
    forged = json.loads(kept_file.read_bytes())
    forged["names"][1] = ["9.jpg"]
    kept_file.write_text(json.dumps(forged))
    assert list_images(root, "", folders).paths[2] == "b/9.jpg", "the kept listing is what is read"
    touch(root, "b/3.jpg")
    assert list_images(root, "", folders).paths == ["a/1.jpg", "a/2.jpg", "b/1.jpg", "b/3.jpg"]


def test_a_damaged_kept_listing_is_remade(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COOP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(layouts, "WORTH_KEEPING", 1)
    root = tmp_path / "images"
    touch(root, "a/1.jpg")
    age(root)
    list_images(root, "", ["a"])
    (kept_file,) = (tmp_path / "cache/listings").glob("*")
    whole = kept_file.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"nonsense"):
        kept_file.write_bytes(damaged)
        assert list_images(root, "", ["a"]).paths == ["a/1.jpg"]
        assert len(kept_file.read_bytes()) == len(whole)


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("COOP_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(layouts, "WORTH_KEEPING", 1)
    touch(tmp_path / "images", "a/1.jpg")
    age(tmp_path / "images")
    assert len(list_images(tmp_path / "images", "", ["a"])) == 1
