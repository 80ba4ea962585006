"""Where files lie that are not code, how to write one, and progress on the terminal."""

import errno
import json
import os
import re
import socket
import stat
import sys
import time
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import yaml
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from coop.errors import CoopError

ASSETS = Path(__file__).resolve().parent / "assets"
PROGRESS_SECONDS = 30.0  # between two lines of progress where there is no terminal
TEMPORARY = ".tmp"  # ending of a file that is being written
STALE_SECONDS = 3600.0  # after which it is taken for that of a killed writer


def resource_folder(name: str) -> Path:
    """Return the folder `name` (conf, datasets, experiments/studies) that came with this toolkit.

    An installed wheel has it inside the package; a checkout has it beside the package, which the project file tells
    apart from a library called `datasets` that happens to be installed there.
    """
    package = Path(__file__).resolve().parent
    inside, beside = package / name, package.parent / name
    if inside.is_dir():
        return inside
    if beside.is_dir() and (package.parent / "pyproject.toml").is_file():
        return beside
    raise CoopError(f"this installation has no folder '{name}' (looked in {inside} and {beside}): install it again")


def read_yaml(path: Path) -> dict[str, Any]:
    """Return a YAML mapping, read by PyYAML's C loader where there is one: it takes a tenth of the time.

    Raises YAMLError, or ValueError for what is not a mapping.
    """
    content = yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    if not isinstance(content, dict):
        raise ValueError("it is not a mapping")
    return {str(key): value for key, value in content.items()}


def cache_folder() -> Path:
    """Return the folder for what can be computed again: COOP_CACHE, or ~/.cache/coop."""
    named = os.environ.get("COOP_CACHE", "").strip()
    try:
        return Path(named).expanduser() if named else Path.home() / ".cache" / "coop"
    except RuntimeError as error:
        place = f"COOP_CACHE={named}" if named else "~/.cache/coop"
        raise CoopError(f"{place}: there is no such home folder; set COOP_CACHE to a folder") from error


def check_writable(path: Path) -> None:
    """Raise OSError if `path`, a file or a folder to be, cannot be made where it is named."""
    whole = _followed(path)
    directly = whole.exists() and not whole.is_file()  # a folder, a device, a pipe
    place = whole if directly else next(parent for parent in whole.parents if parent.exists())
    if not directly and not place.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(place))
    if not os.access(place, os.W_OK):
        number = errno.EROFS if os.statvfs(place).f_flag & os.ST_RDONLY else errno.EACCES
        raise OSError(number, os.strerror(number), str(place))


def check_has_end(path: Path) -> None:
    """Raise OSError for a device or a pipe, which may have no end, and where nothing is."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError(errno.EINVAL, "it is a device or a pipe, not a file", str(path))


def read_file(path: Path) -> bytes:
    """Return what is in a file, a text file's bytes too. Raises OSError for what cannot be read, a device or a pipe."""
    check_has_end(path)
    return path.read_bytes()


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Write a file whole or not at all: yield a temporary path, rename it to `path` on success, remove it on failure.

    A symbolic link stays, and the file that it leads to is replaced. A device or a pipe is written to directly. The
    file is readable by the umask. Raises OSError for what the system refuses, CoopError where `path` is a folder.
    """
    mode = path.stat().st_mode if path.exists() else stat.S_IFREG
    if stat.S_ISDIR(mode):
        raise CoopError(f"{path} is a folder: name a file")
    if not stat.S_ISREG(mode):
        yield from _written_directly(path)
        return
    path = _followed(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    temporary = path.with_name(f"{_prefix(path)}{_machine()}-{os.getpid()}-{uuid.uuid4().hex[:8]}{TEMPORARY}")
    try:
        temporary.touch()
        permissions = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        temporary.chmod(permissions)  # some writers make a file of their own, for its owner alone
        os.replace(temporary, path)
    except Exception as error:
        raise _as_os_error(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)


def _followed(path: Path) -> Path:
    """Return where symbolic links lead; OSError for a link that leads to itself."""
    path = Path(os.path.realpath(path))
    if path.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return path


def _prefix(path: Path) -> str:
    return f".{path.name[:60]}."


def _machine() -> str:
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"


def _remove_leftovers(path: Path) -> None:
    """Remove temporary files of `path` whose writer has ended on this machine, or began an hour ago on another one."""
    for other in os.scandir(path.parent):
        if other.name.startswith(_prefix(path)) and other.name.endswith(TEMPORARY):
            with suppress(OSError):
                if _has_ended(other.name) or time.time() - other.stat().st_mtime > STALE_SECONDS:
                    os.unlink(other.path)


def _has_ended(name: str) -> bool:
    """Tell whether a temporary file's writer was a process of this machine that is no more."""
    writer = re.search(r"\.([0-9a-f]{8})-(\d+)-[0-9a-f]{8}\.tmp$", name)
    if not writer or writer[1] != _machine():
        return False
    try:
        os.kill(int(writer[2]), 0)
    except ProcessLookupError:
        return True
    return False


def remove_temporary_files(folder: Path) -> None:
    """Remove what killed writers left in `folder` (not below it); the caller holds the folder's lock."""
    for path in folder.glob(f".*{TEMPORARY}"):
        path.unlink(missing_ok=True)


def _written_directly(path: Path) -> Iterator[Path]:
    """Yield a temporary file, and copy it to a device or a pipe afterwards."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder) / "content"
        temporary.touch()
        yield temporary
        try:
            with path.open("wb", buffering=0) as target, temporary.open("rb") as source:
                while block := source.read(2**20):
                    target.write(block)
        except OSError as error:
            raise _as_os_error(error, path) from error


def _as_os_error(error: Exception, path: Path) -> Exception:
    """Return the system's refusal that a library's error stands for ("os error 28"), or the error itself."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    if found and not isinstance(error, OSError | CoopError):
        number = int(found[1])
        return OSError(number, os.strerror(number), str(path))
    if isinstance(error, OSError) and error.errno and (not error.filename or str(error.filename).endswith(TEMPORARY)):
        error.filename, error.filename2 = str(path), None  # a refused write() does not say of which file
    return error


T = TypeVar("T")

_shown: list[Progress] = []  # at most one: bars within bars are lines of the same display


@contextmanager
def progress_display() -> Iterator[Progress]:
    """Open the display, or join the one that is open; silent when standard error is not a terminal."""
    if _shown:
        yield _shown[0]
        return
    display = _display(MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with display:
        _shown.append(display)
        try:
            yield display
        finally:
            _shown.pop()


def bytes_display() -> Progress:
    """Return a display that counts the bytes of one file."""
    return _display(DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())


def _display(*columns: ProgressColumn) -> Progress:
    begin, console = (TextColumn("{task.description}"), BarColumn()), Console(stderr=True)
    return Progress(*begin, *columns, console=console, transient=True, disable=not sys.stderr.isatty())


@contextmanager
def progress(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yield a function that shows how many of `total` are done: a bar on a terminal, elsewhere a line every 30 s."""
    with progress_display() as display:
        task = display.add_task(description, total=total)
        begin = shown = time.monotonic()

        def show(done: int) -> None:
            nonlocal shown
            now = time.monotonic()
            if not display.disable:
                display.update(task, completed=done)
            elif now - shown >= PROGRESS_SECONDS:
                print(f"{description}: {done} of {total} after {now - begin:.0f} s", file=sys.stderr, flush=True)
                shown = now

        try:
            yield show
        finally:
            display.remove_task(task)


def track(items: Iterable[T], description: str, total: int) -> Iterator[T]:
    """Yield `items`, showing how many of `total` are done."""
    with progress(description, total) as show:
        for done, item in enumerate(items):
            show(done)
            yield item


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(value, indent=1, default=str) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Return what `write_json` wrote."""
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value
