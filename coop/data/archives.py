"""Unpacking archives that nobody vouches for: no path and no link leaves the target."""

import calendar
import lzma
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path

from coop.data.dataset import path_fault, shortened
from coop.errors import CoopError, first_line
from coop.io import bytes_display, track

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
DAMAGED = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, RuntimeError)


def is_archive(path: Path) -> bool:
    """Tell by its name whether a file is an archive that `extract` can unpack."""
    return path.name.lower().endswith(ARCHIVES)


def extract(archive: Path, target: Path, below: str = "") -> None:
    """Unpack the files of `archive`, or those under `below`, into the new folder `target`.

    Only regular files are written, with ordinary permissions and the times that the archive gives. Raises CoopError
    for a path that leaves the target, for any link or device, and for a damaged archive; `target` is gone again then.
    """
    target.mkdir(parents=True)
    try:
        if archive.name.lower().endswith(".zip"):
            _extract_zip(archive, target, below)
        else:
            _extract_tar(archive, target, below)
    except BaseException as error:
        shutil.rmtree(target, ignore_errors=True)
        if isinstance(error, DAMAGED):
            raise CoopError(f"cannot unpack {archive} into {target.parent}: {first_line(error)}") from error
        raise


def _extract_tar(archive: Path, target: Path, below: str) -> None:
    def checked(member: tarfile.TarInfo, place: str) -> tarfile.TarInfo | None:
        path = _checked(archive, member.name, member.isfile() or member.isdir())
        return tarfile.data_filter(member, place) if _is_below(path, below) else None

    with (
        bytes_display() as bar,
        bar.open(archive, "rb", description=f"unpacking {archive.name}") as file,
        tarfile.open(fileobj=file, mode="r:*") as tar,
    ):
        tar.extractall(str(target), filter=checked)


def _extract_zip(archive: Path, target: Path, below: str) -> None:
    with zipfile.ZipFile(archive) as zipped:
        members = zipped.infolist()
        check_space(target, sum(member.file_size for member in members), f"what {archive} holds")
        for member in track(members, f"unpacking {archive.name}", total=len(members)):
            kind = stat.S_IFMT(member.external_attr >> 16)
            path = _checked(archive, member.filename, kind in (0, stat.S_IFREG, stat.S_IFDIR))
            if _is_below(path, below):
                written = zipped.extract(member, target)
                with suppress(ValueError):  # a month 0, which some programs write
                    time = calendar.timegm((*member.date_time, 0, 0, 0))
                    os.utime(written, (time, time))


def _checked(archive: Path, name: str, ordinary: bool) -> str:
    """Return the member's path in plain form; CoopError if it could write outside the target."""
    fault = path_fault(name)
    if fault:
        raise CoopError(f"{archive} is not unpacked: {fault.replace('image folder', 'target folder')}")
    if not ordinary:
        raise CoopError(f"{archive} is not unpacked: {shortened(name)} is a link or a device, not a file")
    return "/".join(step for step in name.split("/") if step not in ("", "."))


def _is_below(path: str, folder: str) -> bool:
    return not folder or path == folder or path.startswith(f"{folder}/")


def check_space(folder: Path, needed: int, what: str) -> None:
    """Raise CoopError if `needed` bytes are more than the disk of `folder` has free."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CoopError(f"{what} takes {needed / 1e9:.1f} GB, but {folder} has only {free / 1e9:.1f} GB free")
