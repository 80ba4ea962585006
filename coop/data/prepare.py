"""Getting a dataset: what its description lists is fetched, checked and unpacked; what cannot be is said in words."""

import http.client
import os
import shutil
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pooch
from filelock import FileLock, Timeout
from rich.progress import Progress, TaskID

from coop.data.archives import check_space, extract, is_archive
from coop.data.dataset import shortened
from coop.data.hub import export
from coop.data.spec import DatasetSpec, Download, dataset_folder
from coop.errors import REFUSALS, CoopError, first_line
from coop.io import bytes_display

WORK = ".prepare"  # folder in the dataset's own, so that renaming never crosses a file system
TRIES = 5  # in a row without a byte of progress
PAUSE = 1.0  # seconds before the second try, doubled for each further one
BLOCK = 1 << 20
TIMEOUT = 60.0  # seconds without an answer
TIME_LIMIT = 600.0  # seconds for a download, and more for a long one:
SLOWEST = 20_000  # bytes a second


def prepare_dataset(spec: DatasetSpec, data_root: Path, say: Callable[[str], None]) -> bool:
    """Bring the dataset's folder as far as possible, saying each step; return whether nothing is left to do.

    What is there is not touched. A download that fails is said, with the way by hand, and the others go on.
    """
    folder = dataset_folder(spec, data_root)
    work = folder / WORK
    failures = 0
    with _locked(work):
        for item in wanted(spec):
            try:
                say(_obtain(item, folder, work))
            except CoopError as error:
                failures += 1
                say(f"FAILED: {error}. By hand: put {file_name(item)} into {folder} and run this again")
        if (spec.idx or spec.reader == "hub") and not failures and not is_complete(spec, folder):
            say(f"{export(spec, folder).name}: written, with the images in {spec.images}")
        if spec.official_split and not (folder / spec.official_split.file).is_file():
            say(f"until {spec.official_split.file} is there, runs make a split of their own where they can, and say so")
        done = not failures and is_complete(spec, folder)
        if done:
            _remove_leftovers(work)
    if spec.manual and not done:
        say(f"By hand, in {folder}: {spec.manual}")
    return done


def _remove_leftovers(work: Path) -> None:
    """Remove what calls that were killed left in the work folder, but not the lock, which is ours."""
    for left in work.iterdir():
        if left.is_dir():
            shutil.rmtree(left)
        elif left.name != "lock":
            left.unlink()


@contextmanager
def _locked(work: Path) -> Iterator[None]:
    """Make the work folder and keep other calls out of it; remove it again unless parts of downloads are kept there."""
    try:
        work.mkdir(parents=True, exist_ok=True)
        with FileLock(work / "lock", timeout=0):
            yield
        if [child.name for child in work.iterdir()] == ["lock"]:
            shutil.rmtree(work)
            if not any(work.parent.iterdir()):
                work.parent.rmdir()
    except Timeout as error:
        raise CoopError(f"another 'coop data prepare' is at work in {work.parent}") from error
    except OSError as error:
        raise CoopError(f"cannot write {error.filename or work}: {error.strerror}") from error


def wanted(spec: DatasetSpec) -> list[Download]:
    """Return the description's downloads, and its official split file."""
    split = spec.official_split
    if split is None or not split.url:
        return spec.downloads
    return [*spec.downloads, Download(split.url, split.file, sha256=split.sha256, filename=split.file)]


def is_complete(spec: DatasetSpec, folder: Path) -> bool:
    """Tell whether everything that the description needs and downloads is there, by name."""
    needed = [folder / path for path in spec.needs or [spec.images]]
    return all(map(_has_content, needed)) and all(_is_there(item, folder) for item in wanted(spec))


def file_name(item: Download) -> str:
    """Return the name that the downloaded file has on disk."""
    return item.filename or Path(unquote(urlsplit(item.url).path)).name


def _is_there(item: Download, folder: Path) -> bool:
    return _has_content(folder / (item.done_when or item.creates))


def _has_content(place: Path) -> bool:
    return any(place.iterdir()) if place.is_dir() else place.exists()


def _obtain(item: Download, folder: Path, work: Path) -> str:
    """Fetch one item unless it is there, and put it into its place; return what was done."""
    if _is_there(item, folder):
        return f"{item.done_when or item.creates}: there"
    by_hand = folder / file_name(item)
    file = by_hand if by_hand.is_file() else work / file_name(item)
    if file == by_hand:
        check_sum(by_hand, item.md5, item.sha256)
    elif not file.is_file():
        download(item.url, file, item.md5, item.sha256)
    if not is_archive(file):
        place = folder / item.creates
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, place)
        return f"{item.creates}: fetched"
    try:
        _unpack(file, item.member, item, folder, work)
    except CoopError:
        if file != by_hand and not (item.md5 or item.sha256):
            file.unlink()  # nobody knows whether it is what it should be
        raise
    if file != by_hand:
        file.unlink()
    return f"{item.done_when or item.creates}: unpacked from {file.name}"


def _unpack(archive: Path, member: str, item: Download, folder: Path, work: Path) -> None:
    """Unpack an archive beside its place and move what is wanted there; an archive in the archive is unpacked too."""
    inside = member or ("" if item.creates == "." else item.creates)
    fresh = work / f"{archive.name}.unpacked"
    shutil.rmtree(fresh, ignore_errors=True)  # of a call that was killed
    try:
        extract(archive, fresh, inside)
        found = fresh / inside
        if not found.exists():
            raise CoopError(f"{archive} has no '{inside}': it is another archive than {item.url} used to be")
        if found.is_file() and is_archive(found) and not is_archive(Path(item.creates)):
            _unpack(found, "", item, folder, work)
        else:
            _move(found, folder, item)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _move(found: Path, folder: Path, item: Download) -> None:
    """Move what was unpacked to its place; what proves that it is there comes last."""
    whole = {found: folder / item.creates}
    if item.creates == ".":
        children = sorted(found.iterdir(), key=lambda child: child.name == item.done_when)
        whole = {child: folder / child.name for child in children}
    for fresh, place in whole.items():
        if not _has_content(place):
            if place.is_dir():
                place.rmdir()
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(fresh, place)


# Fetching one file: carried on where it broke off, and checked before it has its name.


class _Broken(Exception):
    """The connection broke off before the end: worth another try."""


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follow redirects to http and https only, and none from https back to http."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        scheme = urlsplit(newurl).scheme
        if scheme != "https" and scheme != req.type:
            raise CoopError(f"{req.full_url} leads to another kind of address, {shortened(newurl)}, which is refused")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def download(
    url: str,
    path: Path,
    md5: str | None = None,
    sha256: str | None = None,
    pause: float = PAUSE,
    time_limit: float = TIME_LIMIT,
) -> None:
    """Fetch `url` into `path`, which exists only once it is whole and its checksum is right.

    What has come so far lies in `<path>.part`, from where the next call goes on. Raises CoopError when the server
    refuses, when several tries in a row bring nothing, after `time_limit` seconds and the file's length at `SLOWEST`,
    and for a wrong checksum (the part is thrown away then).
    """
    if urlsplit(url).scheme not in ("http", "https"):
        raise CoopError(f"{shortened(url)} is not a web address: it should begin with https://")

    def fetch(address: str, output_file: str, _: object) -> None:
        part = path.with_name(path.name + ".part")
        _fetch_in_tries(address, part, pause, time.monotonic() + time_limit)
        os.replace(part, output_file)
        _tag_file(part).unlink(missing_ok=True)

    pooch.get_logger().setLevel("ERROR")  # it would print every download and its hash
    try:
        pooch.retrieve(url, _known_hash(md5, sha256), path.name, path.parent, downloader=fetch)
    except ValueError as error:
        found = first_line(error).split(". ")[0]
        raise CoopError(f"{url} is not the file that it should be: {found}") from error


def check_sum(path: Path, md5: str | None, sha256: str | None) -> None:
    """Raise CoopError if the file has another checksum than the one that is known."""
    known = _known_hash(md5, sha256)
    if known:
        kind, expected = known.split(":")
        found = pooch.file_hash(str(path), kind)
        if found != expected.lower():
            raise CoopError(f"{path} is not the file that it should be: {kind} {found}, expected {expected}")


def _known_hash(md5: str | None, sha256: str | None) -> str | None:
    return f"sha256:{sha256}" if sha256 else f"md5:{md5}" if md5 else None


def _fetch_in_tries(url: str, part: Path, pause: float, deadline: float) -> None:
    """Fetch until the part is the whole file; give up after some tries in a row without a byte of progress."""
    failures = 0
    with bytes_display() as bar:
        task = bar.add_task(part.name.removesuffix(".part"), total=None)
        while True:
            before = _size(part)
            try:
                return _fetch(url, part, bar, task, deadline)
            except _Broken as error:
                failures = 1 if _size(part) > before else failures + 1
                if failures >= TRIES:
                    tries = f"{TRIES} tries brought no more of {url}"
                    raise CoopError(f"{tries}: {error}; run this again later") from error
                time.sleep(pause * 2 ** (failures - 1))


def _fetch(url: str, part: Path, bar: Progress, task: TaskID, deadline: float) -> None:
    """Append to `part` what it lacks; raises _Broken where another try may help."""
    start, tag = _size(part), _tag_file(part).read_text() if _tag_file(part).exists() else ""
    headers = {"User-Agent": "coop-clip", "Accept-Encoding": "identity"}
    if start and tag:  # without a tag nobody can tell whether the file is still the same: begin again
        headers |= {"Range": f"bytes={start}-", "If-Range": tag}
    try:
        opener = urllib.request.build_opener(Redirects)
        with opener.open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as answer:
            goes_on = answer.status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {start}-")
            if answer.headers.get("Content-Type", "").startswith("text/html"):
                remedy = "open it in a browser and download the file by hand"
                raise CoopError(f"{url} gave a web page, not the file: {remedy}")
            if not goes_on:
                start = 0
                _write_tag(part, answer.headers)
            length = answer.headers.get("Content-Length") or ""
            total = start + int(length) if length.isdecimal() else None
            check_space(part.parent, (total or 0) - start, f"the rest of {url}")
            bar.update(task, total=total, completed=start)
            with part.open("ab" if goes_on else "wb") as file:
                while block := answer.read1(BLOCK):
                    file.write(block)
                    bar.advance(task, len(block))
                    if time.monotonic() > deadline + (total or 0) / SLOWEST:
                        raise CoopError(f"{url} is too slow: {file.tell()} bytes came; run this again to go on")
            if _size(part) < (total if total is not None else 1):
                raise _Broken(f"{_size(part)} of {total or 'some'} bytes came")
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing is left to send: the part is the whole file, or longer than it
            if error.headers.get("Content-Range", "") == f"bytes */{start}":
                return
            _discard(part)
        if error.code in (408, 416, 429) or error.code >= 500:
            raise _Broken(f"HTTP {error.code}") from error
        raise CoopError(f"the server refuses {url}: HTTP {error.code} {first_line(Exception(error.reason))}") from error
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, OSError) and error.errno in REFUSALS:
            raise CoopError(f"cannot write {part}: {error.strerror}") from error
        if isinstance(getattr(error, "reason", None), socket.gaierror) and not _size(part):
            host = urlsplit(url).hostname
            raise CoopError(
                f"cannot find the server {host} of {url}: connect to the network, or mend the address"
            ) from error
        raise _Broken(first_line(error)) from error
    except ValueError as error:
        raise CoopError(f"{shortened(url)} is not a web address: {first_line(error)}") from error


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _tag_file(part: Path) -> Path:
    return part.with_name(part.name + ".tag")


def _write_tag(part: Path, headers: Any) -> None:
    """Keep what identifies this version of the file on the server; a weak ETag cannot be asked for by range."""
    tag = headers.get("ETag", "")
    part.unlink(missing_ok=True)
    _tag_file(part).write_text(tag if tag and not tag.startswith("W/") else headers.get("Last-Modified", ""))


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _tag_file(part).unlink(missing_ok=True)
