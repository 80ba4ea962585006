"""Several processes on one cold cache, of which one that holds a lock is killed; and equal runs in two processes."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from experiments.campaign.place import TRAINED, World
from experiments.campaign.trial import Trial

PROCESSES = 4
TOLERANCE = 1e-3  # of a learned number, relative to the largest, where two threads add in another order


class Cache:
    """Runs of four seeds that share a cache."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.expected = {}
        started = time.monotonic()
        for seed in range(1, PROCESSES + 1):
            case = world.case()
            world.run(self._words(seed), case)
            self.expected[seed] = learned(case / f"results{seed}")
        self.seconds = (time.monotonic() - started) / PROCESSES

    def trial(self, seed: int) -> Trial:
        """Kill one of four processes, the one that holds a lock if there is one; the others and a second try end."""
        generator = random.Random(f"cache {seed}")
        case = self.world.case()
        running = {number: self.world.start(self._words(number), case) for number in range(1, PROCESSES + 1)}
        time.sleep(generator.uniform(0, 2 * self.seconds))
        holders = [number for number, process in running.items() if process.pid in lock_holders()]
        killed = generator.choice(holders or list(running))
        running[killed].kill()
        trial = Trial("cache", seed, f"{PROCESSES} processes, killed {'the holder of a lock' if holders else 'one'}")
        for number, process in running.items():
            outcome = process.wait()
            if number != killed:
                trial.complaints += outcome.complaints(codes=(0,))
        trial.complaints += self.world.run(self._words(killed), case).complaints(codes=(0,))
        trial.complaints += [
            f"seed {number} learned something else"
            for number, content in self.expected.items()
            if content is None or learned(case / f"results{number}") != content
        ]
        return trial

    def _words(self, seed: int) -> list[str]:
        return self.world.run_words(*TRAINED, "shots=2", f"seed={seed}", f"results=results{seed}")


def learned(results: Path) -> bytes | None:
    """Return the content of the results' first learned file."""
    path = next(results.rglob("learned.safetensors"), None)
    return path.read_bytes() if path else None


def lock_holders() -> set[int]:
    """Return the processes that hold a lock on a file (Linux)."""
    try:
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return set()
    return {int(fields[4]) for fields in map(str.split, lines) if "->" not in fields[1] and fields[4].isdigit()}


def repeat(world: World, seed: int) -> Trial:
    """Run the same twice: in two forks, in two processes with a thread each, and with two threads."""
    kind = ("two forks", "two processes, one thread", "one and two threads")[seed % 3]
    trial = Trial("repeat", seed, kind)
    case = world.case()
    files = []
    for number in range(2):
        words = world.run_words(*TRAINED, "shots=2", f"results=results{number}", f"cache=cache{number}")
        if kind == "two forks":
            trial.complaints += world.run(words, case).complaints(codes=(0,))
        else:
            threads = number + 1 if kind == "one and two threads" else 1
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
            done = subprocess.run(
                [sys.executable, "-m", "coop.cli", *words], cwd=case, env=environment, capture_output=True, text=True
            )
            if done.returncode:
                trial.complaints.append(f"exit code {done.returncode}: {done.stderr.strip()[-200:]}")
        files.append(next((case / f"results{number}").rglob("learned.safetensors"), None))
    if files[0] is None or files[1] is None:
        trial.complaints.append("nothing was learned")
    elif kind != "one and two threads":
        if files[0].read_bytes() != files[1].read_bytes():
            trial.complaints.append("the learned files differ")
    else:
        one, two = load_file(files[0]), load_file(files[1])
        for name in one:
            scale = one[name].abs().max().item() if one[name].numel() else 0.0
            if not torch.allclose(one[name].float(), two[name].float(), rtol=0, atol=TOLERANCE * scale):
                trial.complaints.append(f"{name} differs by more than {TOLERANCE} of its largest number")
    return trial
