"""Locks between real processes: one does a run at a time, none twice in a sweep, and a dead process holds nothing."""

import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from coop.io import write_json
from coop.runs.store import RESULT
from coop.runs.workers import ATTEMPT, LOCK, Access, RunLocks, is_locked


def serve(pipe: Connection) -> None:
    """Lock the run that is named, send the access that this gives, and end it as asked."""
    while True:
        folder, locks = pipe.recv()
        with suppress(ValueError, KeyboardInterrupt), locks.lock(folder) as access:
            pipe.send(access)
            order = pipe.recv()
            if order == "fail":
                raise ValueError
            if order == "interrupt":
                raise KeyboardInterrupt
            write_json(folder / RESULT, {})
        pipe.send("ended")


@pytest.fixture(scope="module")
def other() -> Iterator[tuple[Connection, int]]:
    """Start another process; return the pipe to it, and its number."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=serve, args=(theirs,), daemon=True)
    process.start()
    assert process.pid is not None
    yield ours, process.pid
    process.kill()
    process.join()


def access_to(locks: RunLocks, folder: Path) -> Access:
    with locks.lock(folder) as access:
        return access


@pytest.mark.slow
def test_what_others_do_of_a_run(other: tuple[Connection, int], tmp_path: Path) -> None:
    """By how the process ended that had it: of the same sweep, of one that began meanwhile, of one that began after."""
    pipe, pid = other
    for how, expected in (
        ("finish", (Access.OVER, Access.OVER, Access.OVER)),
        ("fail", (Access.OVER, Access.OVER, Access.GRANTED)),
        ("interrupt", (Access.GRANTED, Access.GRANTED, Access.GRANTED)),
        ("kill", (Access.OVER, Access.GRANTED, Access.GRANTED)),
    ):
        folder = tmp_path / how
        ours = RunLocks([folder])
        pipe.send((folder, ours))
        assert pipe.poll(60) and pipe.recv() is Access.GRANTED
        meanwhile = RunLocks([folder])
        assert is_locked(folder)
        assert access_to(ours, folder) is Access.BUSY and access_to(meanwhile, folder) is Access.BUSY
        if how == "kill":
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        else:
            pipe.send(how)
            assert pipe.poll(60) and pipe.recv() == "ended"
        assert not is_locked(folder)
        mark = (folder / ATTEMPT).read_text() if (folder / ATTEMPT).exists() else None
        for locks, access in zip((ours, meanwhile, RunLocks([folder])), expected, strict=True):
            assert access_to(locks, folder) is access, how
            (folder / ATTEMPT).unlink(missing_ok=True)  # our own
            if mark:
                (folder / ATTEMPT).write_text(mark)


def test_a_finished_run_leaves_no_lock(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with RunLocks([folder]).lock(folder) as access:
        assert access is Access.GRANTED
        assert (folder / LOCK).exists() and str(os.getpid()) in (folder / ATTEMPT).read_text()
        write_json(folder / RESULT, {})
    assert [path.name for path in folder.iterdir()] == [RESULT]
    assert access_to(RunLocks([folder]), folder) is Access.OVER
    assert [path.name for path in folder.iterdir()] == [RESULT]


def test_leftovers_of_a_killed_writer_go_with_the_next_start(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".result.json.0a1b2c3d.tmp").write_text("half")
    with RunLocks([folder]).lock(folder) as access:
        assert access is Access.GRANTED
        assert {path.name for path in folder.iterdir()} == {LOCK, ATTEMPT}


def test_a_full_disk_is_no_attempt(tmp_path: Path) -> None:
    """The same sweep may try again what the system refused; a failed run it may not."""
    locks = RunLocks([tmp_path / "refused", tmp_path / "failed"])
    for name, error, expected in (
        ("refused", OSError(28, "No space left on device"), Access.GRANTED),
        ("failed", ValueError("broken"), Access.OVER),
    ):
        with pytest.raises(type(error)), locks.lock(tmp_path / name):
            raise error
        with locks.lock(tmp_path / name) as access:
            assert access is expected
