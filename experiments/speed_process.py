"""What a process's settings do for small steps: OpenMP's waiting and malloc's thresholds (coop.machine).

    python -m experiments.speed --process      # about five minutes

Each measurement is a process of its own, that takes the same steps of CoOp on ten classes; the settings take turns.
With `busy`, as many processes as there are cores spin beside it.
"""

import itertools
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping

SETTINGS: Mapping[str, Mapping[str, str]] = {
    "as coop sets it": {},
    "OpenMP spins": {"OMP_WAIT_POLICY": "active"},
    "OpenMP sleeps at once": {"OMP_WAIT_POLICY": "passive"},
    "one thread": {"OMP_NUM_THREADS": "1"},
    "malloc's defaults": {"MALLOC_TRIM_THRESHOLD_": "131072"},  # set by the user, so that it stays
}
STEPS = 50


def main(repeats: int) -> None:
    """Measure and print a line for each setting."""
    from coop.machine import available_cores

    seconds: dict[tuple[str, int], list[float]] = {}
    faults: dict[str, int] = {}
    for _, (busy, name) in itertools.product(range(repeats), itertools.product((0, available_cores()), SETTINGS)):
        spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
        try:
            environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "MALLOC_"))}
            command = [sys.executable, "-m", "experiments.speed_process"]
            ran = subprocess.run(
                command, env={**environment, **SETTINGS[name]}, check=True, capture_output=True, text=True
            )
        finally:
            for process in spinning:
                process.kill()
                process.wait()
        taken, fault = ran.stdout.split()
        seconds.setdefault((name, busy), []).append(float(taken))
        faults[name] = int(fault)
    print(f"{STEPS} steps of CoOp, 10 classes, lit_lite; median of {repeats} processes")
    for name in SETTINGS:
        quiet, beside = (statistics.median(seconds[name, busy]) for busy in (0, available_cores()))
        print(f"{name:20} {quiet:6.2f} s alone, {beside:6.2f} s beside busy processes, {faults[name]} page faults")


def steps() -> tuple[float, int]:
    """Return the seconds and the page faults of the steps, after some that do not count."""
    from coop.machine import prepare_process

    prepare_process()
    import torch
    import torch.nn.functional as F

    from coop.clip.backbone import load_backbone
    from coop.methods.coop import PromptLearner

    backbone = load_backbone("lit_lite")
    names = [f"{word} {kind}" for word in ("red", "old", "small", "wet", "tall") for kind in ("shirt", "boot")]
    learner = PromptLearner(backbone, names, generator=torch.Generator().manual_seed(0))
    images = F.normalize(torch.randn(10, backbone.joint_width, generator=torch.Generator().manual_seed(0)), dim=1)
    optimizer = torch.optim.SGD([learner.ctx], lr=0.002)

    def step() -> None:
        loss = F.cross_entropy(backbone.logit_scale * images @ learner.class_features().T, torch.arange(10))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    for _ in range(10):
        step()
    faults, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
    for _ in range(STEPS):
        step()
    return time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults


if __name__ == "__main__":
    print(*steps())
