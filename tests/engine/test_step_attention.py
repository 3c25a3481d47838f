"""The layers' metadata of a step: with VLLM_DLLM_CHECK=1 a layout is checked before anything is read by it."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.config.compilation import CUDAGraphMode

from vllm_dllm.attention.csrc import CsrcAttention
from vllm_dllm.attention.interface import Heads
from vllm_dllm.attention.layout import denoise_layout
from vllm_dllm.engine import step_attention
from vllm_dllm.engine.step_attention import StepAttention

HOST = denoise_layout(np.array([20, 40]), np.array([28, 48]), num_nodes=2, block_length=8)


def make(monkeypatch: pytest.MonkeyPatch, check: str) -> StepAttention:
    monkeypatch.setenv("VLLM_DLLM_CHECK", check)
    monkeypatch.setattr(step_attention, "implementation_of", lambda config: CsrcAttention)
    heads = Heads(4, 2, 32, 0.3, torch.float32)
    layer = SimpleNamespace(
        impl=SimpleNamespace(heads=lambda dtype: heads), kv_cache=torch.zeros(5, 2, 16, 64, dtype=torch.float32)
    )
    config: Any = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context={"a": layer}, cudagraph_mode=CUDAGraphMode.FULL),
        model_config=SimpleNamespace(dtype=torch.float32, max_model_len=64),
        scheduler_config=SimpleNamespace(max_num_seqs=3, max_num_batched_tokens=64),
    )
    group = SimpleNamespace(layer_names=["a", "b"], kv_cache_spec=SimpleNamespace(block_size=16))
    cache: Any = SimpleNamespace(kv_cache_groups=[group], num_blocks=5)
    return StepAttention(config, cache, 8, torch.device("cpu"), stores=True)


def page_table(last: int) -> torch.Tensor:
    return torch.tensor([[1, 2, 0, 0], [3, 4, last, 0]], dtype=torch.int32)


@pytest.mark.parametrize("rows", [None, 48])
def test_a_page_that_the_cache_does_not_have_is_an_error_of_the_step(
    rows: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention = make(monkeypatch, "1")

    def step(last: int) -> dict[str, Any]:
        if rows is None:
            return attention.eager(HOST, page_table(last))
        return attention.graph(HOST, page_table(last), rows, None)

    assert step(2).keys() == {"a", "b"}
    with pytest.raises(RuntimeError, match=r"page_table\[1\]\[2\] is 5, the cache has pages 0 to 4 and node 2 sees"):
        step(5)


@pytest.mark.parametrize("check", ["0", "idle"])
def test_otherwise_nothing_waits_for_the_device(check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attention = make(monkeypatch, check)
    monkeypatch.setattr(step_attention, "check_layout", lambda *_, **__: pytest.fail("it copies the layout back"))
    assert attention.eager(HOST, page_table(5)).keys() == {"a", "b"}
