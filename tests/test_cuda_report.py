"""The resource report reads what ptxas prints."""

import importlib.util
import shutil
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts/cuda_report.py"

OUTPUT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN4dllm4cuda12_GLOBAL__N_16attendIfLi64EEEvNS_4ArgsE' for 'sm_80'
ptxas info    : Function properties for _ZN4dllm4cuda12_GLOBAL__N_16attendIfLi64EEEvNS_4ArgsE
    8 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 8 bytes cumulative stack size, 576 bytes smem, 400 bytes cmem[0]
ptxas info    : Compile time = 12.3 ms
ptxas info    : Compiling entry function '_ZN4dllm4cuda12_GLOBAL__N_15mergeENS_4ArgsE' for 'sm_90a'
ptxas info    : Function properties for _ZN4dllm4cuda12_GLOBAL__N_15mergeENS_4ArgsE
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 36 registers, used 0 barriers
"""


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="c++filt is not installed")
def test_each_kernel_is_a_row():
    spec = importlib.util.spec_from_file_location("cuda_report", SCRIPT)
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
    assert list(report.rows(OUTPUT)) == [
        ["`attend<float, 64>`", "sm_80", "168", "576", "8", "20"],
        ["`merge`", "sm_90a", "36", "0", "0", "0"],
    ]
