"""The choice between native ops and their torch twins."""

import logging

import pytest
import torch

from vllm_dllm import ops
from vllm_dllm.draft.native import BY_OPS, BY_TORCH, choose_draft_functions
from vllm_dllm.errors import KernelUnavailable


def test_ops_are_chosen_where_they_are_built(caplog):
    with caplog.at_level(logging.INFO, "vllm.dllm"):
        assert choose_draft_functions(torch.device("cpu")) is BY_OPS
    assert "Drafts are made and verified by native ops for cpu." in caplog.text


@pytest.mark.parametrize("missing", ["propose_nodes", "verify_walk"])
def test_torch_is_chosen_where_an_op_is_missing(missing, caplog, monkeypatch):
    def require(op: str, device_type: str) -> None:
        if op == missing:
            raise KernelUnavailable(f"{op} is not built for {device_type}")

    monkeypatch.setattr(ops, "require", require)
    assert choose_draft_functions(torch.device("cpu")) is BY_TORCH
    assert f"Drafts are made and verified by torch: {missing} is not built for cpu" in caplog.text
