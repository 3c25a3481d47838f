"""Async scheduling where vLLM has none: on a CPU, where a step is done when the call that starts it returns."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest


@contextmanager
def scheduled_ahead() -> Iterator[None]:
    """Leave async scheduling on on a CPU."""
    from vllm.platforms import current_platform

    original = type(current_platform).check_and_update_config

    def check(cls: type, vllm_config: Any) -> None:
        wanted = vllm_config.scheduler_config.async_scheduling
        original(vllm_config)
        vllm_config.scheduler_config.async_scheduling = wanted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(current_platform), "check_and_update_config", classmethod(check))
        patch.setattr("vllm_dllm.engine.step_sizes.current_platform", SimpleNamespace(is_cpu=lambda: False))
        yield


def scheduler_of(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler
