"""One command in a forked process: killed, refused by the system, limited in time, and watched.

The parent has imported the libraries, so a command starts in milliseconds. The child calls the command's `main` as
`python -m` does. Python's audit events tell which files it opens, renames and removes, and whether it starts programs;
the same events are where a fault is put: SIGKILL or an OSError at the n-th operation on a file below the guarded
folder. Writers that are not Python's (torch, safetensors) are reached by a limit on the size of files.
"""

import errno
import os
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TIME_LIMIT = 60.0  # seconds: longer is a hang
LONGEST = 2000  # letters of a line of an error message
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree"}
REMOVALS = {"os.remove", "os.rmdir", "shutil.rmtree"}
FULL = (errno.ENOSPC, errno.EDQUOT)
LISTINGS = {"os.listdir", "os.scandir"}
PROGRAMS = {"os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pty.spawn"}
DEVICES = ("/dev/null", "/dev/tty", "/dev/shm/", "/proc/self/")


@dataclass(frozen=True)
class Fault:
    """What happens at operation `at` (from 1): SIGKILL where `error` is None, else OSError with that number."""

    at: int = 0  # 0: never
    error: int | None = None
    lasting: bool = False  # from that operation on, as a full disk
    reads: bool = False  # count operations that only read, too
    below: str = ""  # count operations below this part of the guarded folder


NO_FAULT = Fault()


@dataclass
class Outcome:
    """How a command ended."""

    words: Sequence[str]
    code: int | None = None  # None: it was killed
    hung: bool = False
    out: str = ""
    err: str = ""
    seconds: float = 0.0
    operations: list[str] = field(default_factory=list)  # what a fault could have hit
    forbidden: list[str] = field(default_factory=list)  # writes outside the guarded folder, programs started

    def last_line(self) -> str:
        """Return the end of what it said."""
        return ((self.err.strip() or self.out.strip()).splitlines() or ["(nothing)"])[-1][:300]

    def complaints(self, codes: Sequence[int] = (0, 1, 2, 130)) -> list[str]:
        """Return what is wrong with it, whatever was asked: empty if nothing is."""
        found = list(self.forbidden)
        if self.hung:
            return [*found, f"no end after {TIME_LIMIT:.0f} s"]
        if self.code is None:
            return [*found, "ended by a signal"]
        if "Traceback (most recent call last)" in self.err + self.out:
            found.append(f"traceback: {self.last_line()}")
        if self.code not in codes:
            found.append(f"exit code {self.code}: {self.last_line()}")
        if self.code and not (self.err + self.out).strip():
            found.append(f"exit code {self.code} without a word")
        if any(len(line) > LONGEST for line in self.err.splitlines()):
            found.append("an error message of more than 2,000 letters")
        return found


class Running:
    """A command that has been started in a child process; `wait` for its outcome."""

    def __init__(
        self,
        main: Callable[[Sequence[str]], int | None],
        words: Sequence[str],
        guarded: Path,
        folder: Path,
        environment: dict[str, str] | None = None,
        fault: Fault = NO_FAULT,
        file_limit: int | None = None,
    ) -> None:
        """Start `main(words)` in `folder`; files above `file_limit` bytes are refused to it."""
        sys.stdout.flush()
        pipes = [os.pipe() for _ in range(3)]
        self.words, self.started, self.reads = words, time.monotonic(), [read for read, _ in pipes]
        self.pid = os.fork()
        if self.pid == 0:
            _be_child(main, words, guarded, folder, environment or {}, fault, file_limit, [write for _, write in pipes])
        for _, write in pipes:
            os.close(write)

    def kill(self) -> None:
        """Kill the command and all processes that it started."""
        with suppress(ProcessLookupError, PermissionError):  # it has ended, or has not yet its own group
            os.killpg(self.pid, signal.SIGKILL)

    def wait(self, kill_after: float | None = None) -> Outcome:
        """Read the command's output until it ends, and kill it `kill_after` seconds after its start."""
        outcome = Outcome(self.words)
        contents: dict[int, bytearray] = {read: bytearray() for read in self.reads}
        is_open, ended, limit = set(self.reads), False, TIME_LIMIT if kill_after is None else kill_after
        while is_open:
            ready = select.select(list(is_open), [], [], 0.05 if ended else 0.01)[0]
            if ended and not ready:
                break  # a process that it left behind holds the pipes
            for read in ready:
                piece = os.read(read, 65536)
                contents[read] += piece
                if not piece:
                    is_open.discard(read)
            if not ended:
                ended = self._ended(outcome, os.WNOHANG)
            if not ended and time.monotonic() - self.started > limit:
                outcome.hung, limit = kill_after is None, TIME_LIMIT
                self.kill()
        if not ended:
            self._ended(outcome, 0)
        self.kill()
        for read in self.reads:
            os.close(read)
        outcome.out, outcome.err, notes = (contents[read].decode("utf-8", "replace") for read in self.reads)
        for line in notes.splitlines():
            kind, _, text = line.partition(" ")
            (outcome.operations if kind == "op" else outcome.forbidden).append(text)
        outcome.seconds = time.monotonic() - self.started
        return outcome

    def _ended(self, outcome: Outcome, flags: int) -> bool:
        pid, status = os.waitpid(self.pid, flags)
        if pid and os.WIFEXITED(status):
            outcome.code = os.WEXITSTATUS(status)
        return pid != 0


def _be_child(
    main: Callable[[Sequence[str]], int | None],
    words: Sequence[str],
    guarded: Path,
    folder: Path,
    environment: dict[str, str],
    fault: Fault,
    file_limit: int | None,
    pipes: list[int],
) -> None:
    """Become the command; never returns."""
    code = 1
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(pipes[0], 1)
        os.dup2(pipes[1], 2)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        os.environ.update(environment)
        tempfile.tempdir = os.environ.get("TMPDIR")  # not the parent's, and no search for one that can be written
        os.chdir(folder)
        sys.argv = ["coop", *words]
        if file_limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
        sys.addaudithook(_watch(os.path.realpath(guarded), fault, pipes[2]))
        result = main(words)
        code = int(result or 0)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code & 0xFF)


def _watch(guarded: str, fault: Fault, note: int) -> Callable[[str, tuple[Any, ...]], None]:
    """Return an audit hook that notes operations below `guarded`, and writes elsewhere, and places the fault."""
    count = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        if event in PROGRAMS:
            os.write(note, f"no started a program: {event} {str(args)[:200]!r}\n".encode())
            return
        if event == "open":
            writes = isinstance(args[2], int) and bool(args[2] & WRITING)
        elif event in CHANGES:
            writes = True
        elif event in LISTINGS and fault.reads:
            writes = False
        else:
            return
        path = args[0]
        if not isinstance(path, (str, bytes, os.PathLike)):
            return
        text = os.path.realpath(os.fsdecode(path)) if b"\0" not in os.fsencode(path) else ""
        if text != guarded and not text.startswith(guarded + os.sep):
            if writes and text and not text.startswith(DEVICES) and "__pycache__" not in text:
                os.write(note, f"no wrote outside: {event} {text[:200]!r}\n".encode())
            return
        inside = text[len(guarded) :].lstrip(os.sep)
        if (not writes and not fault.reads) or not f"{inside}/".startswith(fault.below):
            return
        count += 1
        os.write(
            note,
            f"op {'' if writes else 'read '}{event} {inside[:200]!r}\n".encode("utf-8", "backslashreplace"),
        )
        if fault.at and (count == fault.at or (fault.lasting and count > fault.at)):
            if fault.error in FULL and event in REMOVALS:
                return  # what is full lets go of files
            if fault.error is not None:
                raise OSError(fault.error, os.strerror(fault.error), os.fsdecode(path))
            os.killpg(0, signal.SIGKILL)

    return hook


ERRORS = {name: getattr(errno, name) for name in ("ENOSPC", "EROFS", "EACCES", "EIO", "EDQUOT", "EMFILE")}
