"""Peak memory of a call: of the process by Linux's account, or of the GPU by torch's."""

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from empcause.errors import UserError


def require_linux() -> None:
    """Refuse to measure a process' peak where there is none to be had.

    Raises:
        UserError: not on Linux.
    """
    if sys.platform != "linux":
        raise UserError(
            "The peak of a process is Linux's to tell, and this system is another: leave out memory and long."
        )


def peak_bytes(call: Callable[[], object], device: str) -> int:
    """Return the bytes that a call takes at its peak beside what is there before it.

    Args:
        call: is called once.
        device: "cpu" (of this process, on Linux) or a CUDA device.
    """
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if give_back is not None:  # what the C library keeps of freed memory would be used again and not be counted
        give_back(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
