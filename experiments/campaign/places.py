"""Places that cannot be written or read: full, read-only, of the wrong kind. One sentence, and nothing is replaced."""

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

from experiments.campaign.child import NO_FAULT, Fault
from experiments.campaign.place import TRAINED, World
from experiments.campaign.trial import Trial

KINDS = (
    "a file", "below a file", "a folder", "nothing", "a long name", "a link to itself", "a link to nothing", "a pipe",
    "a device", "read-only", "unreadable", "full",
)  # fmt: skip
FAULTS = {"read-only": (errno.EROFS, False), "unreadable": (errno.EACCES, True), "full": (errno.ENOSPC, False)}
NULL_DEVICE = os.makedev(1, 3)


class Places:
    """Every command that writes or reads somewhere, with every kind of place; the trial of a seed is one pair."""

    def __init__(self, world: World) -> None:
        self.world = world
        case = world.case()
        run = world.run_words(*TRAINED, "shots=1")
        world.run([*run, "results=results"], case)
        learned = next((case / "results").rglob("learned.safetensors"), case / "nothing")
        report = ["report", "few_shot", *world.own_words(), *TRAINED, "shots=1", f"results={case / 'results'}"]
        sample = ["data", "sample", "folder", f"dataset.root={world.base / 'images'}", "--shots", "1"]
        pretrain = ["pairs.csv", "--architecture", "tiny.json", "--epochs", "1", "--batch", "8", "--workers", "0"]
        self.commands: dict[str, Callable[[str], tuple[list[str], dict[str, str]]]] = {
            "results of run": lambda place: ([*run, f"results={place}"], {}),
            "results of table": lambda place: (["table", place], {}),
            "output of table": lambda place: (["table", str(case / "results"), "--output", place], {}),
            "output of report": lambda place: ([*report, "--output", place], {}),
            "output of words": lambda place: (["words", str(learned), "--output", place], {}),
            "output of sample": lambda place: ([*sample, "--output", place], {}),
            "cache": lambda place: ([*run, "results=results"], {"COOP_CACHE": place}),
            "home": lambda place: ([*run, "results=results"], {"COOP_CACHE": "", "HOME": place or "nowhere"}),
            "pre-training": lambda place: ([*pretrain, "--out", place], {}),
        }

    def trial(self, seed: int) -> Trial:
        """Try a pair; the seeds count through all of them."""
        name = list(self.commands)[seed % len(self.commands)]
        kind = KINDS[seed // len(self.commands) % len(KINDS)]
        parts = ("base/pairs.csv", "base/tiny.json", "base/images") if name == "pre-training" else ()
        case = self.world.case(*parts)
        trial = Trial("places", seed, f"{name}: {kind}")
        place = make_place(case, kind)
        words, environment = self.commands[name](place)
        fault = NO_FAULT
        if kind in FAULTS:
            number, reads = FAULTS[kind]
            fault = Fault(at=1, error=number, lasting=True, reads=reads, below="place/")
        before = _state(case / "place")
        descriptor = os.open(case / "place", os.O_RDWR | os.O_NONBLOCK) if kind == "a pipe" else None
        main = "pretrain" if name == "pre-training" else "coop"
        trial.complaints = self.world.run(words, case, main, fault, environment=environment).complaints()
        if descriptor is not None:
            os.close(descriptor)
        if before and _state(case / "place") != before:
            trial.complaints.append(f"replaced {kind}")
        return trial


def make_place(case: Path, kind: str) -> str:
    """Make a place of this kind in the case, and return how a user names it."""
    place = case / "place"
    if kind in ("a file", "below a file"):
        place.write_text("mine\n")
    elif kind in ("a folder", *FAULTS):
        place.mkdir()
        (place / "mine").write_text("mine\n")
    elif kind == "a link to itself":
        place.symlink_to(place)
    elif kind == "a link to nothing":
        place.symlink_to(case / "nowhere" / "x")
    elif kind == "a pipe":
        os.mkfifo(place)
    elif kind == "a device":
        try:
            os.mknod(place, stat.S_IFCHR | 0o666, NULL_DEVICE)
        except OSError:  # not the superuser, or not allowed to: a pipe is the next best
            os.mkfifo(place)
    below = {"below a file": "place/x/y", "nothing": "", "a long name": "x" * 300, **dict.fromkeys(FAULTS, "place/x")}
    return below.get(kind, "place")


def _state(place: Path) -> tuple[int, int] | None:
    """Return the kind of a file that may not be replaced (a link, pipe or device), and its number."""
    if not place.is_symlink() and not place.exists():
        return None
    status = os.lstat(place)
    if stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode):
        return None
    return stat.S_IFMT(status.st_mode), status.st_rdev
