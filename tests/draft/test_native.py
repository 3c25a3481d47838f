"""The choice between native ops and their torch twins."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from vllm_dllm import ops
from vllm_dllm.draft.native import choose_propose, native_nodes, torch_nodes
from vllm_dllm.errors import KernelUnavailable
from vllm_dllm.state.draws import choose_draws, native_draws, torch_draws
from vllm_dllm.state.settle import choose_settle, native_settle, settle
from vllm_dllm.state.step_rows import choose_rows, native_rows, torch_rows
from vllm_dllm.unmask.walk import choose_walk, native_walk, walk

CHOICES = [
    (choose_propose, native_nodes, torch_nodes, "Drafts are made", "propose_nodes"),
    (choose_walk, native_walk, walk, "Canvases are decided", "decide_walk"),
    (choose_draws, native_draws, torch_draws, "Draws are made ready", "row_draws"),
    (choose_rows, native_rows, torch_rows, "Rows are filled", "step_rows"),
    (choose_settle, native_settle, settle, "Steps are settled", "settle_step"),
]
Choose = Callable[[torch.device], Any]


@pytest.mark.parametrize(("choose", "native", "_twin", "done", "_op"), CHOICES)
def test_the_op_is_chosen_where_it_is_built(choose: Choose, native: Any, _twin: Any, done: str, _op: str, caplog):
    with caplog.at_level(logging.INFO, "vllm.dllm"):
        assert choose(torch.device("cpu")) is native
    assert f"{done} by a native op for cpu." in caplog.text


@pytest.mark.parametrize(("choose", "_native", "twin", "done", "op"), CHOICES)
def test_torch_is_chosen_where_the_op_is_missing(
    choose: Choose, _native: Any, twin: Any, done: str, op: str, caplog, monkeypatch
):
    def require(op: str, device_type: str) -> None:
        raise KernelUnavailable(f"{op} is not built for {device_type}")

    monkeypatch.setattr(ops, "require", require)
    assert choose(torch.device("cpu")) is twin
    assert f"{done} by torch: {op} is not built for cpu" in caplog.text
