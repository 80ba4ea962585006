"""Archives are unpacked safely and whole; `prepare_dataset` brings a description's folder as far as it can."""

import io
import json
import stat
import tarfile
import zipfile
from datetime import UTC, datetime
from pathlib import Path

import pytest
from filelock import FileLock

from coop.config import described as described_by
from coop.data import DatasetSpec, parse_description
from coop.data.archives import extract
from coop.data.prepare import prepare_dataset
from coop.data.spec import Download, OfficialSplit
from coop.errors import CoopError
from tests.data_server import serving

FILES = {"top/images/a/1.jpg": b"one", "top/images/b/2.jpg": b"two", "top/list.txt": b"list"}


def tar_bytes(files: dict[str, bytes], *odd: tarfile.TarInfo, mode: str = "w:gz") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for member in odd:
            tar.addfile(member)
    return buffer.getvalue()


def zip_bytes(files: dict[str, bytes], link: str = "") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as zipped:
        for name, content in files.items():
            zipped.writestr(name, content)
        if link:
            member = zipfile.ZipInfo(link)
            member.external_attr = (stat.S_IFLNK | 0o777) << 16
            zipped.writestr(member, "/etc/passwd")
    return buffer.getvalue()


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.tar.gz", tar_bytes(FILES)),
        ("a.tar", tar_bytes(FILES, mode="w")),
        ("a.tgz", tar_bytes({f"./{name}": content for name, content in FILES.items()})),
        ("a.zip", zip_bytes(FILES)),
    ],
)
def test_archives_are_unpacked_whole_or_in_part(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    extract(tmp_path / name, tmp_path / "all")
    assert tree(tmp_path / "all") == FILES
    extract(tmp_path / name, tmp_path / "some", "top/images")
    assert sorted(tree(tmp_path / "some")) == ["top/images/a/1.jpg", "top/images/b/2.jpg"]


@pytest.mark.parametrize(
    "name, content, fault",
    [
        ("a.tar", tar_bytes({"../out": b"x"}, mode="w"), "'../out' leaves the target folder"),
        ("a.tar", tar_bytes({"/etc/out": b"x"}, mode="w"), "leaves the target folder"),
        ("a.tar", tar_bytes({"a": b"x"}, link("b", "/etc"), mode="w"), "'b' is a link"),
        ("a.tar", tar_bytes({"a": b"x"}, link("b", "a", tarfile.LNKTYPE), mode="w"), "'b' is a link"),
        ("a.tar", tar_bytes({}, link("pipe", "", tarfile.FIFOTYPE), mode="w"), "or a device"),
        ("a.tar.gz", tar_bytes(FILES)[:-30], "cannot unpack"),
        ("a.tar.gz", b"no archive", "cannot unpack"),
        ("a.tar", tar_bytes({"a": b"x", "a/b": b"y"}, mode="w"), "cannot unpack"),
        ("a.zip", zip_bytes({"x/../../out": b"x"}), "leaves the target folder"),
        ("a.zip", zip_bytes({"a": b"x"}, link="b"), "'b' is a link"),
        ("a.zip", zip_bytes(FILES)[:-30], "cannot unpack"),
    ],
)
def test_hostile_and_damaged_archives_leave_nothing(tmp_path: Path, name: str, content: bytes, fault: str) -> None:
    box = tmp_path / "box"
    box.mkdir()
    (box / name).write_bytes(content)
    with pytest.raises(CoopError, match=fault):
        extract(box / name, box / "target")
    assert [path.name for path in box.iterdir()] == [name]
    assert [path.name for path in tmp_path.iterdir()] == ["box"]


def described(*downloads: Download, **more: object) -> DatasetSpec:
    description = DatasetSpec("mini", "class_folders", "a {}.", directory="mini", images="images", **more)  # type: ignore[arg-type]
    description.downloads = list(downloads)
    return description


def test_prepare_fetches_unpacks_and_does_nothing_twice(tmp_path: Path) -> None:
    nested = zip_bytes({"outer/inner.tar.gz": tar_bytes({"images/a/1.jpg": b"one"})})
    with serving(
        {"n.zip": nested, "whole.tgz": tar_bytes({"top/list.txt": b"list"}), "s": b"{}", "n.mat": b"m"}
    ) as server:
        description = described(
            Download(server.url("n.zip"), creates="images", member="outer/inner.tar.gz"),
            Download(server.url("whole.tgz"), creates=".", member="top", done_when="list.txt"),
            Download(server.url("n.mat"), creates="labels/n.mat"),
            official_split=OfficialSplit("split.json", server.url("s")),
        )
        said: list[str] = []
        assert prepare_dataset(description, tmp_path, said.append)
        assert tree(tmp_path / "mini") == {
            "images/a/1.jpg": b"one",
            "labels/n.mat": b"m",
            "list.txt": b"list",
            "split.json": b"{}",
        }
        server.requests.clear()
        again: list[str] = []
        assert prepare_dataset(description, tmp_path, again.append)
        assert server.requests == [] and all(line.endswith(": there") for line in again)
        left = tmp_path / "mini" / ".prepare"  # as a call leaves it that is killed before it has tidied up
        (left / "n.zip.unpacked" / "images").mkdir(parents=True)
        (left / "n.zip").write_bytes(nested)
        assert prepare_dataset(description, tmp_path, again.append) and not left.exists()


def test_one_failure_is_said_and_the_others_go_on(tmp_path: Path) -> None:
    with serving({"evil.tar": tar_bytes({"../out": b"x"}, mode="w"), "n.mat": b"m"}) as server:
        description = described(
            Download(server.url("evil.tar"), creates="images"),
            Download(server.url("gone.tar"), creates="videos"),
            Download(server.url("n.mat"), creates="n.mat"),
            manual="ask the authors.",
            official_split=OfficialSplit("split.json", server.url("gone.json")),
        )
        said: list[str] = []
        assert not prepare_dataset(description, tmp_path, said.append)
        assert "leaves the target folder" in said[0] and "put evil.tar into" in said[0]
        assert "HTTP 404" in said[1]
        assert said[2] == "n.mat: fetched" and "put split.json into" in said[3]
        assert said[4].startswith("until split.json is there, runs make a split of their own")
        assert said[5:] == [f"By hand, in {tmp_path / 'mini'}: ask the authors."]
        assert not (tmp_path / "mini/images").exists() and not (tmp_path / "out").exists()


def test_a_file_that_was_fetched_by_hand_is_used_and_kept(tmp_path: Path) -> None:
    (tmp_path / "mini").mkdir()
    (tmp_path / "mini/a.tar").write_bytes(tar_bytes({"images/1.jpg": b"one"}, mode="w"))
    description = described(Download("http://127.0.0.1:9/a.tar", creates="images"))
    assert prepare_dataset(description, tmp_path, lambda _: None)
    assert sorted(tree(tmp_path / "mini")) == ["a.tar", "images/1.jpg"]


def test_an_archive_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mini").mkdir()
    (tmp_path / "mini/a.tar").write_bytes(tar_bytes({"pictures/1.jpg": b"one"}, mode="w"))
    said: list[str] = []
    assert not prepare_dataset(described(Download("http://127.0.0.1:9/a.tar", creates="images")), tmp_path, said.append)
    assert "has no 'images'" in said[0]
    assert sorted(tree(tmp_path / "mini")) == ["a.tar"]


def test_two_at_once_and_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "mini/.prepare").mkdir(parents=True)
    with FileLock(tmp_path / "mini/.prepare/lock"), pytest.raises(CoopError, match="another 'coop data prepare'"):
        prepare_dataset(described(), tmp_path, print)
    (tmp_path / "file").touch()
    with pytest.raises(CoopError, match="cannot write"):
        prepare_dataset(described(), tmp_path / "file", print)


def test_a_download_without_checksum_that_does_not_unpack_is_fetched_anew(tmp_path: Path) -> None:
    good = tar_bytes({"images/1.jpg": b"one"})
    with serving({"a.tar.gz": good[:-20]}) as server:
        description = described(Download(server.url("a.tar.gz"), creates="images"))
        assert not prepare_dataset(description, tmp_path, lambda _: None)
        server.files["a.tar.gz"] = good
        assert prepare_dataset(description, tmp_path, lambda _: None)
    assert tree(tmp_path / "mini") == {"images/1.jpg": b"one"}


def test_a_description_with_downloads_is_plain_data() -> None:
    mapping = {"name": "m", "reader": "folder", "template": "{}", "downloads": [{"url": "u", "creates": "c"}]}
    assert parse_description(json.loads(json.dumps(mapping))).downloads == [Download("u", "c")]


def test_a_null_is_taken_as_it_is_given() -> None:
    assert described_by("eurosat", {"official_split": None}).official_split is None
    with pytest.raises(CoopError, match="template"):
        described_by("eurosat", {"template": None})


def test_a_time_that_is_none_is_left_out(tmp_path: Path) -> None:
    """Some programs write no date into a ZIP file: month 0 and day 0."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as zipped:
        for name, date in (("none", (1980, 0, 0, 0, 0, 0)), ("one", (2001, 2, 3, 4, 5, 6))):
            zipped.writestr(zipfile.ZipInfo(name, date), b"x")
    extract(tmp_path / "a.zip", tmp_path / "a")
    times = {path.name: datetime.fromtimestamp(path.stat().st_mtime, UTC) for path in (tmp_path / "a").iterdir()}
    assert times["one"] == datetime(2001, 2, 3, 4, 5, 6, tzinfo=UTC) and times["none"].year >= 2025
