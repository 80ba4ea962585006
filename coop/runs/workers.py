"""The runs of a sweep, one after the other, beside whoever else does them; what fails does not stop the rest."""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from coop.config import RunConfig, first_line
from coop.errors import CoopError
from coop.io import progress_display
from coop.runs.claims import Claims, Turn
from coop.runs.run import execute, prepare, recording_failure
from coop.runs.store import RESULT, planned_identity
from coop.runs.workshop import Workshop

POLL = 1.0  # seconds between two looks at the runs of others


@dataclass(frozen=True)
class Job:
    """A run to do: what it is and where it goes, without its data, so that it travels light."""

    config: RunConfig
    folder: Path

    @property
    def done(self) -> bool:
        """Whether it has a result already."""
        return (self.folder / RESULT).is_file()

    @property
    def name(self) -> str:
        """Its name for people."""
        return name_of(self.folder, self.config.results)


def work(jobs: Sequence[Job], claims: Claims, workshop: Workshop, wait: bool) -> None:
    """Do the runs that no other process does, in this order. Each failure is recorded in its run's folder.

    With `wait`, return when the others are through with theirs, and do what they leave undone without having tried.
    """
    console = Console(soft_wrap=True, highlight=False)
    with progress_display() as display:
        out = console if display.disable else display.console
        task = display.add_task("runs", total=len(jobs))
        left, settled, told = list(jobs), 0, False
        while left:
            busy = []
            for job in left:
                if _take(job, claims, workshop, out, f"[{settled + 1}/{len(jobs)}] {job.name}"):
                    settled += 1
                    display.advance(task)
                else:
                    busy.append(job)
            if len(busy) == len(left):
                if not wait:
                    break
                if not told:
                    out.print(f"waiting for other processes, which are at {len(busy)} of these runs", highlight=False)
                    told = True
                time.sleep(POLL)
            left = busy
        display.remove_task(task)


def _take(job: Job, claims: Claims, workshop: Workshop, out: Console, place: str) -> bool:
    """Do a run if it is free; return whether it is settled, here or elsewhere."""
    try:
        with claims.claim(job.folder) as turn:
            if turn is Turn.MINE:
                with recording_failure(job.folder, planned_identity(job.config)):
                    run = prepare(job.config, workshop)
                    if run.folder != job.folder:
                        raise CoopError(f"the data is not the same as where the sweep was started: it is {run.folder}")
                result = execute(run, workshop)
                seconds = sum(result["seconds"].values())
                out.print(f"{escape(place)}  {percent(result['accuracy'])}  ({seconds:.1f} s)", highlight=False)
    except Exception as error:
        out.print(f"{escape(place)}  failed: {escape(first_line(error))}", highlight=False)
        return True
    return turn is not Turn.BUSY


def name_of(folder: Path, results: Path) -> str:
    """Return a run's name for people: its folder below the results, without the digest."""
    return re.sub(r"[-/][0-9a-f]{8}$", "", str(folder.relative_to(results)))


def percent(fraction: float) -> str:
    """Return a fraction as a percentage for people."""
    return f"{100 * fraction:.2f} %"
