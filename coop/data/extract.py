"""Unpacking archives that nobody vouches for: no path and no link leaves the target."""

import lzma
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import IO

from coop.data.download import bytes_bar
from coop.data.paths import path_fault
from coop.errors import CoopError

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
DAMAGED = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, RuntimeError)
Member = tuple[str, IO[bytes], int]  # path, content, how far into the archive (bytes)


def is_archive(path: Path) -> bool:
    """Tell by its name whether a file is an archive that `extract` can unpack."""
    return path.name.lower().endswith(SUFFIXES)


def extract(archive: Path, target: Path, below: str = "") -> None:
    """Unpack the files of `archive`, or those under `below`, into the new folder `target`.

    Only regular files are written, with ordinary permissions. Raises CoopError for a path that leaves the target, for
    any link or device, and for a damaged archive; `target` is gone again then.
    """
    target.mkdir(parents=True)
    try:
        with bytes_bar() as bar:
            task = bar.add_task(f"unpacking {archive.name}", total=archive.stat().st_size)
            for path, content, position in _members(archive):
                if not below or path == below or path.startswith(f"{below}/"):
                    place = target / path
                    place.parent.mkdir(parents=True, exist_ok=True)
                    with place.open("xb") as file:
                        shutil.copyfileobj(content, file, 1 << 20)
                bar.update(task, completed=position)
    except BaseException as error:
        shutil.rmtree(target, ignore_errors=True)
        if isinstance(error, DAMAGED):
            raise CoopError(f"cannot unpack {archive}: {error or type(error).__name__}") from error
        raise


def _members(archive: Path) -> Iterator[Member]:
    return _zip_members(archive) if archive.name.lower().endswith(".zip") else _tar_members(archive)


def _tar_members(archive: Path) -> Iterator[Member]:
    with archive.open("rb") as raw, tarfile.open(fileobj=raw, mode="r:*") as tar:
        for member in tar:
            path = _checked(archive, member.name, member.isfile() or member.isdir())
            content = tar.extractfile(member) if member.isfile() else None
            if content and path:
                with closing(content):
                    yield path, content, raw.tell()


def _zip_members(archive: Path) -> Iterator[Member]:
    with zipfile.ZipFile(archive) as zipped:
        needed, free = sum(member.file_size for member in zipped.infolist()), shutil.disk_usage(archive.parent).free
        if needed > free:
            raise CoopError(f"{archive} unpacks to {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free")
        for member in zipped.infolist():
            kind = stat.S_IFMT(member.external_attr >> 16)
            path = _checked(archive, member.filename, kind in (0, stat.S_IFREG, stat.S_IFDIR))
            if path and not member.is_dir():
                with zipped.open(member) as content:
                    yield path, content, member.header_offset


def _checked(archive: Path, name: str, ordinary: bool) -> str:
    """Return the member's path in plain form; CoopError if it could write outside the target."""
    fault = path_fault(name)
    if fault:
        raise CoopError(f"{archive} is not unpacked: {fault.replace('image folder', 'target folder')}")
    if not ordinary:
        raise CoopError(f"{archive} is not unpacked: '{name}' is a link or a device, not a file")
    return "/".join(step for step in name.split("/") if step not in ("", "."))
