"""Fetching one file: with progress, carried on where it broke off, and checked before it has its name."""

import errno
import hashlib
import http.client
import os
import shutil
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import BinaryIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from coop.errors import CoopError

TRIES = 5  # in a row without a byte of progress
PAUSE = 1.0  # seconds before the second try, doubled for each further one
BLOCK = 1 << 20
TIMEOUT = 60.0  # seconds without an answer
NO_REMEDY = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


class _Broken(Exception):
    """The connection broke off before the end: worth another try."""


def bytes_bar() -> Progress:
    """Return a progress display that counts bytes, silent when standard error is not a terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )


def download(url: str, path: Path, md5: str | None = None, sha256: str | None = None, pause: float = PAUSE) -> None:
    """Fetch `url` into `path`, which exists only once it is whole and its checksum is right.

    What has come so far lies in `<path>.part`, from where the next call goes on. Raises CoopError when the server
    refuses, when several tries in a row bring nothing, and for a wrong checksum (the part is thrown away then).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    failures = 0
    with bytes_bar() as bar:
        task = bar.add_task(path.name, total=None)
        while True:
            before = _size(part)
            try:
                _fetch(url, part, bar, task)
                break
            except _Broken as error:
                failures = 1 if _size(part) > before else failures + 1
                if failures >= TRIES:
                    raise CoopError(f"{TRIES} tries brought no more of {url}: {error}; run this again later") from error
                time.sleep(pause * 2 ** (failures - 1))
    try:
        check_sum(part, md5, sha256, url)
    except CoopError:
        _discard(part)
        raise
    os.replace(part, path)
    _tag_file(part).unlink(missing_ok=True)


def _fetch(url: str, part: Path, bar: Progress, task: TaskID) -> None:
    """Append to `part` what it lacks; raises _Broken where another try may help."""
    start, tag = _size(part), _read_tag(part)
    headers = {"User-Agent": "coop-clip", "Accept-Encoding": "identity"}
    if start and tag:  # without a tag nobody can tell whether the file is still the same: begin again
        headers |= {"Range": f"bytes={start}-", "If-Range": tag}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as answer:
            goes_on = answer.status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {start}-")
            _refuse_web_page(url, answer.headers.get("Content-Type", ""))
            if not goes_on:
                start = 0
                _write_tag(part, answer.headers)
            length = answer.headers.get("Content-Length")
            total = start + int(length) if length and length.isdecimal() else None
            _check_space(part, (total or 0) - start)
            bar.update(task, total=total, completed=start)
            with part.open("ab" if goes_on else "wb") as file:
                _copy(answer, file, bar, task)
            if total is not None and _size(part) < total:
                raise _Broken(f"{_size(part)} of {total} bytes came")
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing is left to send: the part is the whole file, or longer than it
            if error.headers.get("Content-Range", "") == f"bytes */{start}":
                return
            _discard(part)
        if error.code in (408, 416, 429) or error.code >= 500:
            raise _Broken(f"HTTP {error.code}") from error
        raise CoopError(f"the server refuses {url}: HTTP {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, OSError) and error.errno in NO_REMEDY:
            raise CoopError(f"cannot write {part}: {error.strerror}") from error
        raise _Broken(str(error) or type(error).__name__) from error
    except ValueError as error:
        raise CoopError(f"'{url}' is not a web address: {error}") from error


def _copy(answer: http.client.HTTPResponse, file: BinaryIO, bar: Progress, task: TaskID) -> None:
    while block := answer.read(BLOCK):
        file.write(block)
        bar.advance(task, len(block))


def _refuse_web_page(url: str, content_type: str) -> None:
    if content_type.startswith("text/html"):
        raise CoopError(f"{url} gave a web page, not the file: open it in a browser and download the file by hand")


def _check_space(part: Path, needed: int) -> None:
    free = shutil.disk_usage(part.parent).free
    if needed > free:
        raise CoopError(f"{part.parent} has {free / 1e9:.1f} GB free, but {needed / 1e9:.1f} GB are still to come")


def check_sum(path: Path, md5: str | None, sha256: str | None, source: str) -> None:
    """Raise CoopError if the file has another checksum than the one that is known."""
    for name, expected in (("sha256", sha256), ("md5", md5)):
        if expected:
            with bytes_bar() as bar, bar.open(path, "rb", description=f"checking {path.name}") as file:
                found = hashlib.file_digest(file, name).hexdigest()  # type: ignore[arg-type]
            if found != expected:
                raise CoopError(f"{source} is not the file that it should be: {name} {found}, expected {expected}")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _tag_file(part: Path) -> Path:
    return part.with_name(part.name + ".tag")


def _read_tag(part: Path) -> str:
    return _tag_file(part).read_text() if _tag_file(part).exists() else ""


def _write_tag(part: Path, headers: http.client.HTTPMessage) -> None:
    """Keep what identifies this version of the file on the server; a weak ETag cannot be asked for by range."""
    tag = headers.get("ETag", "")
    part.unlink(missing_ok=True)
    _tag_file(part).write_text(tag if tag and not tag.startswith("W/") else headers.get("Last-Modified", ""))


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _tag_file(part).unlink(missing_ok=True)
