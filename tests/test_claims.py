"""Claims between real processes: one does a run at a time, none twice in a sweep, and the dead hold nothing."""

import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from coop.io import write_json
from coop.runs.claims import ATTEMPT, LOCK, Claims, Turn, being_done
from coop.runs.store import RESULT


def work_as_told(pipe: Connection) -> None:
    """Claim the run that is named, say whose turn it is, and end it as told."""
    while True:
        folder, claims = pipe.recv()
        with suppress(ValueError, KeyboardInterrupt), claims.claim(folder) as turn:
            pipe.send(turn)
            told = pipe.recv()
            if told == "fail":
                raise ValueError
            if told == "interrupt":
                raise KeyboardInterrupt
            write_json(folder / RESULT, {})
        pipe.send("ended")


@pytest.fixture(scope="module")
def other() -> Iterator[tuple[Connection, int]]:
    """Start another process; return the pipe to it, and its number."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=work_as_told, args=(theirs,), daemon=True)
    process.start()
    assert process.pid is not None
    yield ours, process.pid
    process.kill()
    process.join()


def turn_of(claims: Claims, folder: Path) -> Turn:
    with claims.claim(folder) as turn:
        return turn


def test_what_others_do_of_a_run(other: tuple[Connection, int], tmp_path: Path) -> None:
    """By how the process ended that had it: of the same sweep, of one that began meanwhile, of one that began after."""
    pipe, pid = other
    for how, expected in (
        ("finish", (Turn.OVER, Turn.OVER, Turn.OVER)),
        ("fail", (Turn.OVER, Turn.OVER, Turn.MINE)),
        ("interrupt", (Turn.MINE, Turn.MINE, Turn.MINE)),
        ("kill", (Turn.OVER, Turn.MINE, Turn.MINE)),
    ):
        folder = tmp_path / how
        ours = Claims([folder])
        pipe.send((folder, ours))
        assert pipe.poll(60) and pipe.recv() is Turn.MINE
        meanwhile = Claims([folder])
        assert turn_of(ours, folder) is Turn.BUSY and turn_of(meanwhile, folder) is Turn.BUSY and being_done(folder)
        if how == "kill":
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        else:
            pipe.send(how)
            assert pipe.poll(60) and pipe.recv() == "ended"
        assert not being_done(folder)
        mark = (folder / ATTEMPT).read_text() if (folder / ATTEMPT).exists() else None
        for claims, turn in zip((ours, meanwhile, Claims([folder])), expected, strict=True):
            assert turn_of(claims, folder) is turn, how
            (folder / ATTEMPT).unlink(missing_ok=True)  # our own
            if mark:
                (folder / ATTEMPT).write_text(mark)


def test_a_finished_run_has_no_claims_on_it(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with Claims([folder]).claim(folder) as turn:
        assert turn is Turn.MINE
        assert (folder / LOCK).exists() and str(os.getpid()) in (folder / ATTEMPT).read_text()
        write_json(folder / RESULT, {})
    assert [path.name for path in folder.iterdir()] == [RESULT]
    assert turn_of(Claims([folder]), folder) is Turn.OVER
    assert [path.name for path in folder.iterdir()] == [RESULT]
