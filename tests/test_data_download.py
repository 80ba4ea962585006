"""Downloads go on where they broke off, are checked, and leave nothing half-written under the file's name."""

import hashlib
import random
import urllib.request
from pathlib import Path

import pytest

from coop.data.prepare import SLOWEST, TRIES, Redirects, download
from coop.errors import CoopError
from tests.data_server import raw_server, serving

CONTENT = random.Random(1).randbytes(100_000)
MD5, SHA256 = hashlib.md5(CONTENT).hexdigest(), hashlib.sha256(CONTENT).hexdigest()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_comes_whole_and_alone(tmp_path: Path) -> None:
    with serving({"a.zip": CONTENT}) as server:
        download(server.url("a.zip"), tmp_path / "x" / "a.zip", MD5, SHA256)
    assert (tmp_path / "x" / "a.zip").read_bytes() == CONTENT
    assert names(tmp_path / "x") == ["a.zip"]


def test_a_dropped_connection_goes_on_from_where_it_was(tmp_path: Path) -> None:
    with serving({"a": CONTENT}) as server:
        server.drops["a"] = [40_000, 30_000]
        download(server.url("a"), tmp_path / "a", sha256=SHA256, pause=0.0)
        assert server.requests == [("a", None), ("a", "bytes=40000-"), ("a", "bytes=70000-")]
    assert (tmp_path / "a").read_bytes() == CONTENT


def test_a_server_that_keeps_failing_is_given_up_and_the_next_call_goes_on(tmp_path: Path) -> None:
    with serving({"a": CONTENT}) as server:
        server.drops["a"] = [60_000] + [0] * TRIES
        with pytest.raises(CoopError, match="bytes came; run this again"):
            download(server.url("a"), tmp_path / "a", pause=0.0)
        assert names(tmp_path) == ["a.part", "a.part.tag"]
        server.drops["a"], server.requests = [], []
        download(server.url("a"), tmp_path / "a", sha256=SHA256, pause=0.0)
        assert server.requests == [("a", "bytes=60000-")]
    assert names(tmp_path) == ["a"]


def test_a_file_that_changed_meanwhile_is_fetched_anew(tmp_path: Path) -> None:
    with serving({"a": b"old" * 1000}) as server:
        server.drops["a"] = [500] + [0] * TRIES
        with pytest.raises(CoopError):
            download(server.url("a"), tmp_path / "a", pause=0.0)
        server.files["a"], server.version, server.drops["a"] = CONTENT, "2", []
        download(server.url("a"), tmp_path / "a", sha256=SHA256)
    assert (tmp_path / "a").read_bytes() == CONTENT


def test_a_server_without_ranges_begins_again(tmp_path: Path) -> None:
    with serving({"a": CONTENT}) as server:
        server.ranges, server.drops["a"] = False, [99_999]
        download(server.url("a"), tmp_path / "a", sha256=SHA256, pause=0.0)
    assert (tmp_path / "a").read_bytes() == CONTENT


def test_a_part_that_was_whole_already_is_kept(tmp_path: Path) -> None:
    (tmp_path / "a.part").write_bytes(CONTENT)
    (tmp_path / "a.part.tag").write_text('"1"')
    with serving({"a": CONTENT}) as server:
        download(server.url("a"), tmp_path / "a", sha256=SHA256, pause=0.0)
        assert server.requests == [("a", "bytes=100000-")]
    assert names(tmp_path) == ["a"]


def test_passing_server_errors_are_waited_out(tmp_path: Path) -> None:
    with serving({"a": CONTENT}) as server:
        server.statuses["a"] = [503, 429]
        download(server.url("a"), tmp_path / "a", sha256=SHA256, pause=0.0)
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("kind", ["md5", "sha256"])
def test_a_wrong_checksum_leaves_nothing(tmp_path: Path, kind: str) -> None:
    with serving({"a": CONTENT}) as server, pytest.raises(CoopError, match=f"expected {kind}:00 but got"):
        download(server.url("a"), tmp_path / "a", **{kind: "00"})
    assert names(tmp_path) == []


def test_a_web_page_in_place_of_a_file_and_a_missing_file(tmp_path: Path) -> None:
    with serving({"a": b"<html>"}) as server:
        server.types["a"] = "text/html; charset=utf-8"
        with pytest.raises(CoopError, match="gave a web page"):
            download(server.url("a"), tmp_path / "a")
        with pytest.raises(CoopError, match="refuses .*HTTP 404"):
            download(server.url("b"), tmp_path / "b")
    assert names(tmp_path) == []


def test_no_server_at_all(tmp_path: Path) -> None:
    with serving({}) as server:
        url = server.url("a")
    with pytest.raises(CoopError, match="5 tries brought no more of .*refused"):
        download(url, tmp_path / "a", pause=0.0)
    with pytest.raises(CoopError, match="cannot find the server nowhere.invalid"):  # told at once: nothing has come
        download("http://nowhere.invalid/a", tmp_path / "a", pause=0.0)
    with pytest.raises(CoopError, match="not a web address"):
        download("nonsense", tmp_path / "a", pause=0.0)


def test_a_download_that_takes_too_long_is_given_up_and_kept(tmp_path: Path) -> None:
    with serving({"a": CONTENT}) as server:
        server.slow["a"] = 0.05  # seconds before each of 100 pieces
        with pytest.raises(CoopError, match="too slow.*run this again"):
            download(server.url("a"), tmp_path / "a", time_limit=0.3 - len(CONTENT) / SLOWEST)
        assert names(tmp_path) == ["a.part", "a.part.tag"]
        assert 0 < (tmp_path / "a.part").stat().st_size < len(CONTENT)
        server.slow.clear()
        download(server.url("a"), tmp_path / "a", sha256=SHA256)
    assert (tmp_path / "a").read_bytes() == CONTENT


def test_redirects_stay_with_the_web(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    with serving({"a": CONTENT}) as server:
        for target in ("ftp://127.0.0.1/a", f"file://{tmp_path}/secret", "data:,x"):
            server.redirects["r"] = target
            with pytest.raises(CoopError, match="refused|refuses"):
                download(server.url("r"), tmp_path / "b", pause=0.0)
        server.redirects["r"] = server.url("a")
        download(server.url("r"), tmp_path / "b", sha256=SHA256)
    assert names(tmp_path) == ["b", "secret"]
    for url in ("ftp://127.0.0.1/a", f"file://{tmp_path}/secret", "data:,x"):
        with pytest.raises(CoopError, match="not a web address"):
            download(url, tmp_path / "c")


@pytest.mark.parametrize(
    "old, new, allowed", [("https", "http", False), ("http", "https", True), ("http", "http", True)]
)
def test_a_redirect_never_leaves_https(old: str, new: str, allowed: bool) -> None:
    request = urllib.request.Request(f"{old}://example.org/a")
    if allowed:
        assert Redirects().redirect_request(request, None, 302, "", {}, f"{new}://example.org/b").type == new
    else:
        with pytest.raises(CoopError, match="another kind of address"):
            Redirects().redirect_request(request, None, 302, "", {}, f"{new}://example.org/b")


def test_a_binary_reply_is_never_printed_raw(tmp_path: Path) -> None:
    noise = bytes(random.Random(2).randbytes(3000)).replace(b"\n", b"")
    for reply in (noise + b"\n", b"HTTP/1.1 404 " + noise + b"\r\n\r\n", b"HTTP/1.1 200 OK\r\n" + noise + b"\r\n\r\n"):
        with raw_server(reply) as url, pytest.raises(CoopError) as error:
            download(url, tmp_path / "a", pause=0.0)
        assert str(error.value).isprintable() and len(str(error.value)) < 500
