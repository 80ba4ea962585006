"""Who does which run, where several processes work on one results folder.

While a process does a run it holds a lock in the run's folder, which the system frees when the process ends, however
it ends. Beside it lies the mark of the attempt, so that no run is tried twice in one sweep: the others see that it
was tried, also where the process died of it. A finished run's folder has neither.
"""

import os
import socket
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path

from filelock import FileLock, Timeout

from coop.io import write_text
from coop.runs.store import RESULT

LOCK, ATTEMPT = ".lock", ".attempt"
PATIENCE = 0.1  # seconds: longer than another process's look at the lock, far shorter than a run


class Turn(Enum):
    """Whose run it is: `MINE`, of another process that is at it (`BUSY`), or done or tried in this sweep (`OVER`)."""

    MINE = "mine"
    BUSY = "busy"
    OVER = "over"


class Claims:
    """The claims on the runs of one sweep, by their folders; made before its first run, and carried to its processes.

    What was tried before, by an earlier sweep, may be tried again.
    """

    def __init__(self, folders: Iterable[Path]) -> None:
        self._before = {folder: _attempt(folder) for folder in folders}

    @contextmanager
    def claim(self, folder: Path) -> Iterator[Turn]:
        """Take a run if it is free, and keep it while inside; the caller does it only where its turn is `MINE`.

        An error that leaves this block is the end of the attempt; an interruption (Ctrl-C, a cluster that wants the
        machine back) withdraws it.
        """
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        try:
            lock.acquire(timeout=PATIENCE, poll_interval=PATIENCE / 4)
        except Timeout:
            yield Turn.BUSY
            return
        try:
            if _done(folder) or _attempt(folder) not in (None, self._before[folder]):
                yield Turn.OVER
            else:
                with _attempting(folder):
                    yield Turn.MINE
        finally:
            done = _done(folder)
            lock.release()
            if done:  # whoever still holds the old lock file sees the result
                for name in (LOCK, ATTEMPT):
                    with suppress(OSError):
                        (folder / name).unlink()


def being_done(folder: Path) -> bool:
    """Whether a process is at a run, as far as a look without claiming it can tell."""
    if not (folder / LOCK).exists():
        return False
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


@contextmanager
def _attempting(folder: Path) -> Iterator[None]:
    _mark(folder)
    try:
        yield
    except Exception:
        _mark(folder)  # anew: it has failed also for a sweep that began meanwhile
        raise
    except BaseException:
        (folder / ATTEMPT).unlink(missing_ok=True)
        raise


def _mark(folder: Path) -> None:
    write_text(folder / ATTEMPT, f"{uuid.uuid4().hex} {socket.gethostname()} {os.getpid()}\n")


def _attempt(folder: Path) -> str | None:
    try:
        return (folder / ATTEMPT).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


def _done(folder: Path) -> bool:
    return RESULT in os.listdir(folder)  # opens the folder: a network file system then looks again
