"""How much memory a call takes at its peak, beyond what was there before."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

_PROCESS = Path("/proc/self")


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Run `work` and return its highest memory, results included.

    On a GPU it is what torch's allocator handed out. On a CPU it is the high-water mark of the process's resident
    memory, set back before (proc(5), clear_refs), so that what kernels take without torch counts too; Linux counts
    pages in batches, so it is accurate to about half a MiB.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    gc.collect()  # what is freed while the work is done would hide as much of its own
    ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed is not there to be taken again
    (_PROCESS / "clear_refs").write_text("5")
    before = _resident_bytes("VmRSS")
    work()
    return max(0, _resident_bytes("VmHWM") - before)  # pages are counted late


def _resident_bytes(field: str) -> int:
    lines = (_PROCESS / "status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
