"""Memory of a process that works on the CPU."""

import ctypes
import os
import sys

# Of glibc's mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_VARIABLES = ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_")


def keep_freed_memory() -> bool:
    """Let the process keep what tensors free for those that come next.

    By default glibc gives large blocks back to the system at once, and the system hands out new ones page by page, with a fault
    for each: a step of training takes and frees hundreds of MiB. This changes the whole process, so it is for commands.

    Returns:
        False, and nothing is changed, where the C library is another one, or the user chose by one of glibc's variables.
    """
    if sys.platform != "linux" or any(name in os.environ for name in _VARIABLES):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1) and mallopt(_M_MMAP_MAX, 0))
