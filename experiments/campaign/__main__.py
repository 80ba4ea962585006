"""Try to break the command line, and count what survives.

    python -m experiments.campaign                        # everything: about 1,000 kills, 10,000 fuzzed inputs, ...
    python -m experiments.campaign --short                # under a minute
    python -m experiments.campaign --part kills --first 317 --count 1   # one trial again

Parts: kills (at every file operation, and at random), faults (a system that refuses), places (full, read-only, of the
wrong kind), fuzz (files and words that no reader expects), cache (processes that share one, of which one is killed),
extremes (of numbers), repeat (equal runs).
Prints how many trials were tried, survived and failed, and each failure with the seed that repeats it.
"""

import argparse
import importlib
import os
import pkgutil
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from experiments.campaign.place import Main, World
    from experiments.campaign.trial import Trial

FULL = {"kills": 1000, "faults": 400, "places": 108, "fuzz": 10_000, "cache": 20, "extremes": 100, "repeat": 3}
SHORT = {"kills": 6, "faults": 6, "places": 12, "fuzz": 27, "cache": 1, "extremes": 6, "repeat": 1}


def main(words: Sequence[str] | None = None) -> int:
    """Run the campaign; return 1 if anything failed."""
    args = _arguments().parse_args(words)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")  # before torch is imported: processes are forked
    from experiments.campaign.place import World
    from experiments.campaign.trial import Trial

    coop, pretrain = _import_everything()
    folder = Path(args.keep or tempfile.mkdtemp(prefix="coop-campaign-"))
    world = World(folder / "world", coop, pretrain)
    parts = args.part or list(FULL)
    counts = SHORT if args.short else FULL
    end = time.monotonic() + (args.seconds or (50 if args.short else 1e9))
    failed = 0
    print(f"{'part':10} {'tried':>7} {'survived':>9} {'failed':>7} {'seconds':>8}")
    failures: list[Trial] = []
    for number, part in enumerate(parts):
        started = time.monotonic()
        until = started + (end - started) / (len(parts) - number)
        tried = bad = 0
        count = counts[part] if args.count is None else args.count
        for trial in _trials(part, world, range(args.first, args.first + count), args.only):
            tried += 1
            if trial.complaints:
                bad += 1
                failures.append(trial)
                if args.verbose:
                    _show(trial)
            world.close(keep=bool(trial.complaints and args.keep))
            if time.monotonic() > until:
                break
        failed += bad
        print(f"{part:10} {tried:7,} {tried - bad:9,} {bad:7,} {time.monotonic() - started:8.0f}", flush=True)
    for trial in () if args.verbose else failures:
        _show(trial)
    if not args.keep:
        shutil.rmtree(folder, ignore_errors=True)
    return int(failed > 0)


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m experiments.campaign", description="try to break the command line")
    parser.add_argument("--short", action="store_true", help="a few trials of each part, in under a minute")
    parser.add_argument("--part", action="append", choices=list(FULL), help="only this part; repeatable")
    parser.add_argument("--only", help="only trials of this job (kills, faults) or reader (fuzz)")
    parser.add_argument("--first", type=int, default=0, metavar="SEED", help="the first trial's seed (0)")
    parser.add_argument("--count", type=int, help="trials of each part")
    parser.add_argument("--seconds", type=float, help="stop after so long; each part gets its share")
    parser.add_argument("--keep", metavar="FOLDER", help="work in this folder, and keep what failed trials left there")
    parser.add_argument("--verbose", action="store_true", help="print failures when they happen")
    return parser


def _import_everything() -> tuple["Main", "Main"]:
    """Import the commands and all modules, so that a forked command starts at once; return the two `main`s."""
    import torch

    import coop
    from coop.cli import main as coop_main
    from experiments.pretrain.__main__ import main as pretrain_main

    torch.set_num_threads(1)
    for module in pkgutil.walk_packages(coop.__path__, "coop."):
        with suppress(ImportError):  # a module that needs an extra
            importlib.import_module(module.name)
    return coop_main, pretrain_main


def _trials(part: str, world: "World", seeds: range, only: str | None) -> Iterator["Trial"]:
    from experiments.campaign import extremes, shared
    from experiments.campaign.fuzz import Fuzz
    from experiments.campaign.interrupt import Jobs
    from experiments.campaign.places import Places

    if part in ("kills", "faults"):
        jobs = Jobs(world, only)
        world.close(keep=True)
        yield from jobs.unusable
        for seed in seeds if jobs.jobs else ():
            yield jobs.kill(seed) if part == "kills" else jobs.refuse(seed)
    elif part == "fuzz":
        fuzz = Fuzz(world)
        world.close(keep=True)
        readers = [name for name in fuzz.readers if only in (None, name)]
        for seed in seeds:  # readers in turn; a reader has seeds of its own
            yield fuzz.trial(readers[seed % len(readers)], seed // len(readers))
    elif part == "places":
        places = Places(world)
        world.close(keep=True)
        for seed in seeds:
            yield places.trial(seed)
    elif part == "cache":
        cache = shared.Cache(world)
        world.close(keep=True)
        for seed in seeds:
            yield cache.trial(seed)
    else:
        for seed in seeds:
            yield extremes.trial(world, seed) if part == "extremes" else shared.repeat(world, seed)


def _show(trial: "Trial") -> None:
    only = f" --only {trial.what.split(':')[0]!r}" if trial.part == "fuzz" else ""
    print(f"failed: --part {trial.part}{only} --first {trial.seed} --count 1: {trial.what}")
    for complaint in trial.complaints:
        print(f"    {complaint}")


if __name__ == "__main__":
    sys.exit(main())
