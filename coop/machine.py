"""How this process keeps memory."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def keep_freed_memory() -> None:
    """Let the allocator keep what tensors free instead of giving it back to the system and asking again.

    A step on a CPU allocates and frees tensors of megabytes; by default glibc maps and unmaps each, and the system
    clears its pages anew every time. Does nothing where the C library is another one.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)  # glibc's upper limit
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
