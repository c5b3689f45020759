"""Freed memory kept for the next update, on a CPU.

glibc hands a freed block of some size back to the system at once, so that every update asks for its activations anew and the
system clears them page by page: 17,000 page faults and 5 % of an update of SiD on a network of 7 million weights
(`python -m benchmarks.step`). An update needs what the last one needed, so a benchmark's process keeps it; a run does not,
since memory measured later in its process would be wrong.
"""

from __future__ import annotations

import ctypes
import sys

__all__ = ["keep_freed_memory"]

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
LARGEST = 2**31 - 1
PAD = 2**26


def keep_freed_memory() -> bool:
    """Let the process keep what it frees, up to 2 GB beyond what is in use; False where the C library is not glibc."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = {M_MMAP_THRESHOLD: LARGEST, M_TRIM_THRESHOLD: LARGEST, M_TOP_PAD: PAD}
    return all([mallopt(key, value) == 1 for key, value in settings.items()])
