"""An absent or unfit library is explained, never replaced in silence."""

import pytest
import torch

from vllm_dllm.errors import KernelUnavailable
from vllm_dllm.ops import load
from vllm_dllm.ops.library import cuda_archs


def test_missing_library(tmp_path):
    with pytest.raises(KernelUnavailable, match=r"missing\.so is missing; build them: .*pip install"):
        load.load_library(tmp_path / "missing.so")


def test_broken_library(tmp_path):
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    with pytest.raises(KernelUnavailable, match=r"do not load with torch .*: .*; rebuild them: .*pip install"):
        load.load_library(broken)


def test_library_older_than_the_package(monkeypatch):
    """It is said before anything is registered, which cannot be done twice with torch 2.10."""
    monkeypatch.setattr(load, "OPS", (*load.OPS, "op_of_tomorrow"))
    monkeypatch.setattr(torch.library, "register_fake", lambda op, _fake: pytest.fail(f"{op} was registered"))
    with pytest.raises(KernelUnavailable, match="is older than vllm-dllm and lacks op_of_tomorrow; rebuild it"):
        load.load_library()


def test_unknown_device():
    with pytest.raises(KernelUnavailable, match=r"vocab_stats has no kernel for xpu tensors; use one of"):
        load.require("vocab_stats", "xpu")


def test_built_without_cuda():
    if cuda_archs():
        pytest.skip("the ops are built with CUDA")
    with pytest.raises(KernelUnavailable, match="vocab_stats was built for the CPU alone"):
        load.require("vocab_stats", "cuda")


@pytest.mark.parametrize("op", ["decide_walk", "vocab_stats"])
def test_a_tensor_on_another_device_is_refused(op):
    """A lone tensor on `meta` makes torch call the fake, which would leave results unwritten."""
    canvas = torch.zeros(2, 3, 4, dtype=torch.int64)
    arguments = {
        "decide_walk": (canvas, torch.ones(2, 3, dtype=torch.bool, device="meta"), None, None, [], [], [], 0, False, 0),
        "vocab_stats": (torch.ones(2, 8), torch.ones(5, 8, device="meta"), 0, [], 1, False, *(None,) * 6),
    }
    load.require(op, "cpu")
    with pytest.raises(RuntimeError, match=f"{op}: the tensors are on cpu and meta; allowed is one device; move them"):
        getattr(torch.ops.vllm_dllm, op)(*arguments[op])
