"""Commands that are killed, or that the system refuses a file operation: nothing is lost, and the same command ends.

The trial of a seed is the same each time. The first seeds go through every file operation of every command in turn;
the others choose the command, and the operation or the moment, at random.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.campaign.child import ERRORS, Fault, Outcome
from experiments.campaign.place import SWEEP, World, leftovers, serve
from experiments.campaign.trial import Trial

COMPARED = (".safetensors", ".csv", ".tex", ".md", ".png")
FILE_LIMITS = (0, 1, 200, 1000, 4000, 20_000)
PRETRAIN = ("pairs.csv", "--out", "out", "--epochs", "3", "--batch", "12", "--warmup", "1", "--save-every", "1",
            "--workers", "0", "--architecture", "tiny.json", "--device", "cpu")  # fmt: skip


@dataclass
class Job:
    """A command, what its folder holds before it, and how it ends when nothing is in its way."""

    name: str
    words: Sequence[str]
    parts: tuple[str, ...] = ()  # of the world, copied into the folder first
    main: str = "coop"
    whole: Outcome | None = None
    made: dict[str, str] | None = None


class Jobs:
    """The commands of the campaign, each run once in peace."""

    def __init__(self, world: World, only: str | None = None) -> None:
        self.world = world
        sweep = world.run_words(*SWEEP, "results=results")
        more = [word.replace("seed=1,2", "seed=1,2,3") for word in sweep]
        jobs = [Job("sweep, cold cache", sweep)]
        first = world.case()
        self.unusable: list[Trial] = []
        self.jobs: list[Job] = []
        if not world.run(sweep, first).code:  # what the others start from
            prepared = first.relative_to(world.folder).as_posix()
            report = ["results=results", *world.own_words(), *SWEEP[1:]]
            jobs += [
                Job("sweep, warm cache", sweep, (f"{prepared}/cache",)),
                Job("sweep, half done", more, (f"{prepared}/cache", f"{prepared}/results")),
                Job(
                    "table", ["table", "results", "--format", "csv", "--output", "table.csv"], (f"{prepared}/results",)
                ),
                Job("report", ["report", "few_shot", *report, "--output", "report"], (f"{prepared}/results",)),
            ]
        archive = f"[{{url: '{serve(world.base)}/colours.zip', creates: '2750', member: images/train}}]"
        prepare = [f"dataset.downloads={archive}", "dataset.official_split=null", "--data-root", "data"]
        jobs += [
            Job("prepare", ["data", "prepare", "eurosat", *prepare]),
            Job("sample", ["data", "sample", "folder", *world.own_words()[1:3], "--shots", "2", "--output", "s.json"]),
            Job("pre-training", PRETRAIN, ("base/tiny.json", "base/images", "base/pairs.csv"), main="pretrain"),
        ]
        for job in jobs:
            if only not in (None, job.name):
                continue
            case = world.case(*job.parts)
            job.whole = world.run(job.words, case, job.main, Fault(reads=True))
            complaints = job.whole.complaints(codes=(0,))
            if complaints:
                self.unusable.append(Trial("jobs", 0, job.name, complaints))
                continue
            job.made = made(world, case)
            self.jobs.append(job)

    def kill(self, seed: int) -> Trial:
        """Kill a command, run it again, and compare."""
        generator = random.Random(f"kill {seed}")
        place = seed
        for job in self.jobs:  # every operation of every command in turn
            if place < (count := self._changes(job)):
                return self._killed(seed, job, Fault(at=place + 1), None)
            place -= count
        job = generator.choice(self.jobs)
        assert job.whole
        if generator.random() < 0.5:
            return self._killed(seed, job, Fault(at=generator.randint(1, self._changes(job))), None)
        return self._killed(seed, job, Fault(), generator.uniform(0, 1.2 * job.whole.seconds))

    def refuse(self, seed: int) -> Trial:
        """Let the system refuse something to a command: it says so in a sentence; run again, it ends as ever."""
        generator = random.Random(f"refuse {seed}")
        job = generator.choice(self.jobs)
        if generator.random() < 0.2:
            limit = generator.choice(FILE_LIMITS)
            return self._refused(seed, job, f"no file above {limit} bytes", Fault(), limit)
        name = generator.choice(list(ERRORS))
        reads, lasting = generator.random() < 0.3, name in ("ENOSPC", "EROFS", "EDQUOT") or generator.random() < 0.3
        at = generator.randint(1, len(_operations(job)) if reads else max(1, self._changes(job)))
        words = f"{name} at operation {at}{' and after' * lasting}{', reads too' * reads}"
        return self._refused(seed, job, words, Fault(at, ERRORS[name], lasting, reads), None)

    def _changes(self, job: Job) -> int:
        return sum(not operation.startswith("read") for operation in _operations(job))

    def _killed(self, seed: int, job: Job, fault: Fault, after: float | None) -> Trial:
        moment = f"{after:.2f} s" if after is not None else f"operation {fault.at}"
        trial = Trial("kills", seed, f"{job.name}, killed at {moment}")
        case = self.world.case(*job.parts)
        self.world.run(job.words, case, job.main, fault, kill_after=after)
        self._again(trial, job, case)
        return trial

    def _refused(self, seed: int, job: Job, words: str, fault: Fault, limit: int | None) -> Trial:
        trial = Trial("faults", seed, f"{job.name}, {words}")
        case = self.world.case(*job.parts)
        outcome = self.world.run(job.words, case, job.main, fault, file_limit=limit)
        trial.complaints += outcome.complaints()
        told = "left out as damaged: " in outcome.err
        told |= any("no nearest words:" in page.read_text() for page in case.glob("report/*.html"))
        if outcome.code == 0 and not told and made(self.world, case) != job.made:
            trial.complaints.append("exit code 0, but not everything was made")
        self._again(trial, job, case)
        return trial

    def _again(self, trial: Trial, job: Job, case: Path) -> None:
        """Run the command once more, and compare with what it makes in peace."""
        finished = {path: path.read_bytes() for path in case.glob("results/**/result.json")}
        again = self.world.run(job.words, case, job.main)
        if complaints := again.complaints(codes=(0,)):
            trial.complaints += [f"run again: {complaint}" for complaint in complaints]
            return
        trial.complaints += [
            f"lost or changed: {path.relative_to(case)}"
            for path, content in finished.items()
            if not path.exists() or path.read_bytes() != content
        ]
        there = made(self.world, case)
        assert job.made is not None
        different = sorted(name for name in there.keys() | job.made.keys() if there.get(name) != job.made.get(name))
        trial.complaints += [f"not as in peace: {name}" for name in different[:3]]
        trial.complaints += [f"left behind: {name}" for name in leftovers(case)[:3]]


def _operations(job: Job) -> list[str]:
    assert job.whole
    return job.whole.operations


def made(world: World, case: Path) -> dict[str, str]:
    """Return {file: digest} of what counts: tables as text, learned files and weights to the bit."""
    found = {}
    for path in sorted(case.rglob("*")):
        relative = path.relative_to(case)
        if relative.parts[0] in ("home", "tmp", "cache", "images") or path.suffix not in COMPARED or not path.is_file():
            continue
        found[relative.as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    if (case / "results").is_dir():
        found["coop table"] = world.run(["table", "results", "--format", "csv"], case).out
    return found
