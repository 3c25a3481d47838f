"""What a machine can do at best: the time below which no kernel can go."""

import ctypes
import os
import shlex
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from vllm_dllm.ops.library import cpu_isa

_READ_BYTES = 256 << 20
_NUM_ROUNDS = 5
_NUM_MULTIPLY_ADDS = 4_000_000  # some 10 ms
_MATRIX = 8192  # where a GPU comes closest to its peak; random, since products of zeros take less power


_SOURCE = Path(__file__).with_name("multiply_adds.cpp")
_CSRC = _SOURCE.parents[2] / "csrc"
_ISA_OPTIONS = {
    "portable": "",
    "avx2": "-march=x86-64-v3",
    "avx512": "-march=x86-64-v4",
    "avx512_bf16": "-march=x86-64-v4 -mavx512bf16",
}
"""As in CMakeLists.txt."""


@dataclass(frozen=True, slots=True)
class Rates:
    """The best that was measured."""

    bytes_per_s: float  # read from memory
    flops_per_s: float  # a multiplication and an addition are two

    def __str__(self) -> str:
        return f"{self.bytes_per_s / 1e9:.1f} GB/s, {self.flops_per_s / 1e9:,.0f} GFLOP/s"

    def floor_ms(self, num_bytes: float, num_flops: float) -> float:
        """Return the time of a kernel that reads and writes so much and computes so much, the two at once."""
        return 1e3 * max(num_bytes / self.bytes_per_s, num_flops / self.flops_per_s)


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Measure reading, and multiplying and adding in a dtype, on as many threads as kernels have.

    A CPU multiplies in registers with the instruction set that the ops use. A GPU multiplies matrices, which is the
    rate of its tensor cores, or for float32 of its ordinary ones.
    """
    data = torch.ones(_READ_BYTES // 4, device=device)
    bytes_per_s = _READ_BYTES / _least_seconds(data.sum, device)
    if device.type == "cpu":
        is_bfloat16 = dtype == torch.bfloat16
        multiply_adds = load_multiply_adds()
        num_flops = float(multiply_adds(_NUM_MULTIPLY_ADDS, is_bfloat16))
        seconds = _least_seconds(lambda: multiply_adds(_NUM_MULTIPLY_ADDS, is_bfloat16), device)
    else:
        matrix = torch.randn(_MATRIX, _MATRIX, device=device, dtype=dtype)
        num_flops = 2.0 * _MATRIX**3
        seconds = _least_seconds(lambda: matrix @ matrix, device)
    return Rates(bytes_per_s, num_flops / seconds)


@cache
def load_multiply_adds() -> Callable[[int, bool], int]:
    """Compile multiply_adds.cpp for the instruction set that the ops run with; needs a C++ compiler."""
    isa = cpu_isa()
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    options = shlex.split(f"-std=c++20 -O3 -ffp-contract=fast -fopenmp -shared -fPIC -Wno-psabi {_ISA_OPTIONS[isa]}")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "multiply_adds.so"
        command = [*compiler, *options, f"-DDLLM_ISA={isa}", f"-I{_CSRC}", str(_SOURCE), "-o", str(library)]
        subprocess.run(command, check=True)
        loaded = ctypes.CDLL(str(library))
    loaded.multiply_adds.argtypes, loaded.multiply_adds.restype = (ctypes.c_int64, ctypes.c_bool), ctypes.c_int64

    def multiply_adds(num_rounds: int, is_bfloat16: bool) -> int:
        num_flops: int = loaded.multiply_adds(num_rounds, is_bfloat16)
        return num_flops

    return multiply_adds


def _least_seconds(work: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(1 + _NUM_ROUNDS):
        begin = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return min(times)
