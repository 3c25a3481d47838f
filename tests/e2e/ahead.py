"""Async scheduling where vLLM has none: on a CPU, where a step is done when the call that starts it returns."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from tests.e2e.rig import Case
from vllm_dllm.engine.worker_check import CheckLevel


@contextmanager
def scheduled_ahead() -> Iterator[None]:
    """Leave async scheduling on on a CPU, in engines that check their state behind every step."""
    from vllm.platforms import current_platform

    original = type(current_platform).check_and_update_config

    def check(cls: type, vllm_config: Any) -> None:
        wanted = vllm_config.scheduler_config.async_scheduling
        original(vllm_config)
        vllm_config.scheduler_config.async_scheduling = wanted

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_DLLM_CHECK", "1")
        patch.setattr(type(current_platform), "check_and_update_config", classmethod(check))
        patch.setattr("vllm_dllm.engine.step_sizes.current_platform", SimpleNamespace(is_cpu=lambda: False))
        yield


def scheduler_of(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


def check_canvases(llm: Any, cases: list[Case], answers: list[list[int]]) -> None:
    """Run cases that ask for their canvases: each is a part of the answer and has what the one before had."""
    assert scheduler_of(llm)._level == CheckLevel.STEP
    shown: dict[str, list[dict[int, int]]] = {str(i): [] for i in range(len(cases))}
    for name, case in zip(shown, cases, strict=True):
        params = case.sampling_params()
        params.extra_args["dllm_stream"] = "denoising"
        llm.llm_engine.add_request(name, {"prompt_token_ids": list(case.prompt)}, params)
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            its, tokens = output.kv_transfer_params["dllm"], output.outputs[0].token_ids
            if "canvas" in its:
                assert its["canvas_start"] == len(tokens)
                known = dict(enumerate([*tokens, *its["canvas"]]))
                shown[output.request_id].append({place: token for place, token in known.items() if token is not None})
    for canvases, answer in zip(shown.values(), answers, strict=True):
        assert all(known == {place: answer[place] for place in known} for known in canvases)
        sizes = [len(known) for known in canvases]
        assert sizes == sorted(sizes)
    assert len({len(known) for canvases in shown.values() for known in canvases}) > 8, "too few were shown"
