"""How a process uses the machine: what OpenMP is told, before torch is there, and what the user has set stays."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow  # every test starts a process that imports torch
SHOW = """
import os, sys
from coop.machine import available_cores, prepare_process
prepare_process()
assert "torch" not in sys.modules
import torch
print(os.environ["OMP_WAIT_POLICY"], torch.get_num_threads(), available_cores())
"""


def shown(**environment: str) -> list[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "MKL_"))}
    command = [sys.executable, "-c", SHOW]
    return subprocess.run(
        command, env={**kept, **environment}, check=True, capture_output=True, text=True
    ).stdout.split()


def test_threads_sleep_and_are_as_many_as_the_cores() -> None:
    policy, threads, cores = shown()
    assert policy == "passive" and threads == cores
    assert int(cores) <= len(os.sched_getaffinity(0))


def test_what_the_user_has_set_stays() -> None:
    policy, threads, _ = shown(OMP_WAIT_POLICY="active", OMP_NUM_THREADS="1")
    assert (policy, threads) == ("active", "1")


def test_a_process_bound_to_one_core_has_one_thread() -> None:
    one = min(os.sched_getaffinity(0))
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "MKL_"))}
    bound = f"import os; os.sched_setaffinity(0, {{{one}}})\n{SHOW}"
    found = subprocess.run([sys.executable, "-c", bound], env=kept, check=True, capture_output=True, text=True)
    assert found.stdout.split() == ["passive", "1", "1"]
