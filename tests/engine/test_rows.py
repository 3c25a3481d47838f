"""What is said of a request whose frozen K/V are lost."""

import logging
from types import SimpleNamespace

import pytest

from vllm_dllm.config import DllmConfig
from vllm_dllm.engine.rows import StepRows


@pytest.mark.parametrize("name", ["freecache", "vicinity", "dkv_pd"])
def test_who_lost_what_it_kept_is_named(
    name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    rows = StepRows(DllmConfig(block_length=4, kv_policy=name), 64, 64)  # type: ignore[arg-type]
    request = SimpleNamespace(request_id="a", num_prompt_tokens=8, num_tokens=8, sampling_params=None)
    rows.admit(request, 0)  # type: ignore[arg-type]
    assert not caplog.records
    request.num_tokens = 12
    rows.admit(request, 0)  # type: ignore[arg-type]
    said = dict.fromkeys(record.getMessage() for record in caplog.records)  # vLLM's logger may hand one on twice
    assert [("Request a was preempted behind its first block" in text) for text in said] == [True] * (
        name != "vicinity"
    )


@pytest.mark.parametrize(
    ("server", "asked", "num_sequences"),
    [(None, None, 1), (0.0, None, 1), (0.0, 1.5, 2), (1.0, None, 2), (1.0, 0, 1)],
)
def test_a_guided_request_has_the_rows_of_two(server: float | None, asked: float | None, num_sequences: int) -> None:
    rows = StepRows(DllmConfig(block_length=4, refresh_every=1, cfg_scale=server), 64, 640)
    extra = None if asked is None else {"dllm_cfg_scale": asked}
    request = SimpleNamespace(
        request_id="a",
        num_prompt_tokens=8,
        num_tokens=8,
        max_tokens=8,
        sampling_params=SimpleNamespace(extra_args=extra),
    )
    rows.admit(request, 0)  # type: ignore[arg-type]
    assert rows.first(request, 0) == 16 * num_sequences  # type: ignore[arg-type]
    rows.kv.note("a", 8)
    assert rows.needed([request]) == ([16 * num_sequences], [False], [16 * num_sequences])  # type: ignore[list-item]
    assert rows.longest == (64 if server is None else 128)
