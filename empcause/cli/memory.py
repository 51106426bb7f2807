"""Settings of the C library's memory allocator for work on the CPU."""

import ctypes
import os
import sys

# Parameters of glibc's mallopt(3), and the environment variables by which a user sets them.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_VARIABLES = ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_")


def keep_freed_memory() -> bool:
    """Make the process keep freed memory for the next tensors.

    A step of training takes and frees hundreds of MiB. By default glibc returns large blocks to the system at once, and new ones
    cost a page fault per page. This changes the whole process, so only commands do it.

    Returns:
        Whether it was changed: not with another C library, and not if the user has set one of glibc's variables.
    """
    if sys.platform != "linux" or any(name in os.environ for name in _VARIABLES):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1) and mallopt(_M_MMAP_MAX, 0))
