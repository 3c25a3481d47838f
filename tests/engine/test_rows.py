"""What is said of a request whose frozen K/V are lost."""

import logging
from types import SimpleNamespace

import pytest

from vllm_dllm.config import DllmConfig
from vllm_dllm.engine.rows import StepRows


@pytest.mark.parametrize("name", ["freecache", "vicinity"])
def test_who_lost_what_it_kept_is_named(
    name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    rows = StepRows(DllmConfig(block_length=4, kv_policy=name), 64, 64)  # type: ignore[arg-type]
    request = SimpleNamespace(request_id="a", num_prompt_tokens=8, num_tokens=8)
    rows.admit(request, 0)  # type: ignore[arg-type]
    assert not caplog.records
    request.num_tokens = 12
    rows.admit(request, 0)  # type: ignore[arg-type]
    said = [record.getMessage() for record in caplog.records]
    assert [("Request a was preempted behind its first block" in text) for text in said] == [True] * (
        name == "freecache"
    )
