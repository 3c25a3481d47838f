"""What oneDNN keeps of the products that it compiled does not grow with the numbers of rows."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow("engines")

PROGRAM = """
import ctypes, os, sys
import torch
from vllm import _custom_ops as ops
from vllm.platforms import current_platform
from vllm_dllm.engine.cpu.primitive_cache import bound_primitive_cache

class Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena o s h hblkhd u f uordblks fordblks k".split()]

mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Mallinfo

current_platform.import_kernels()
bound_primitive_cache(8)
assert "ONEDNN_PRIMITIVE_CACHE_CAPACITY" not in os.environ
handler = ops.create_onednn_mm(torch.randn(512, 256).t(), 1)
used = {}
for rows in range(1, 81):
    ops.onednn_mm(handler, torch.zeros(rows, 256), None)
    used[rows] = mallinfo().uordblks
print((used[80] - used[16]) / 2**20)
"""


def test_memory_does_not_grow_with_the_numbers_of_rows() -> None:
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert float(run.stdout.splitlines()[-1]) < 4, "MiB; 64 products take about 16"
