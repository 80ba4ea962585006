"""How this process uses the machine's cores and memory: decided once, before torch is loaded."""

import ctypes
import os
import sys
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's malloc.h


def prepare_process() -> None:
    """Set up threads and memory for tensors on a CPU. Call it before torch is imported: OpenMP reads these only once.

    `OMP_WAIT_POLICY=passive`, `GOMP_SPINCOUNT=2000`: idle OpenMP threads wait some microseconds for the next part of a
    step and then sleep. By default they spin, which makes the small steps of few-shot training many times slower as
    soon as anything else uses a core; where they sleep at once, waking them takes as long as the step.
    `OMP_NUM_THREADS`: the cores that this process may use (of its affinity and of its container's quota, where torch
    would count all). What the user has set stays. Numbers: docs/performance.md.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("OMP_NUM_THREADS", str(available_cores()))
    keep_freed_memory()


def available_cores() -> int:
    """Return how many cores this process may use: of its affinity and of its control group's quota; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, int(quota) // int(period)) if quota != "max" else cores
    except (OSError, ValueError):
        pass  # no control group of version 2
    return max(cores, 1)


def keep_freed_memory() -> None:
    """Let the allocator keep what tensors free instead of giving it back to the system and asking again.

    A step on a CPU allocates and frees tensors of megabytes; by default glibc maps and unmaps each, and the system
    clears its pages anew every time. Does nothing where the C library is another one, or where the user has set
    MALLOC_MMAP_MAX_, MALLOC_MMAP_THRESHOLD_ or MALLOC_TRIM_THRESHOLD_.
    """
    of_the_user = {"MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"}
    if sys.platform != "linux" or of_the_user & set(os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)  # the threshold above which it maps could only be raised to 32 MiB
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
