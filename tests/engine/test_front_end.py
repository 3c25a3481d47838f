"""A front end of one of our models admits requests by our rules, on whichever way they come."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.utils.async_utils import make_async
from vllm.v1.engine.input_processor import InputProcessor

from vllm_dllm.engine import front_end


def test_prompts_that_an_asynchronous_engine_has_to_read_are_admitted_like_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vLLM binds the method for raw prompts when it makes its processor, before it becomes ours."""
    monkeypatch.setattr(front_end, "is_ours", lambda config: True)
    monkeypatch.setattr(front_end.serving, "install", lambda: None)
    monkeypatch.setattr(front_end.DllmInputProcessor, "process_inputs", lambda self, *args: ("ours", *args))
    with ThreadPoolExecutor(1) as executor:
        processor: Any = InputProcessor.__new__(InputProcessor)
        processor.renderer, processor.model_config = SimpleNamespace(_executor=executor), None
        processor.process_inputs_async = make_async(processor.process_inputs, executor=executor)
        front_end.take_over(processor)

        async def admit() -> Any:
            return await processor.process_inputs_async("id", "a prompt")

        assert asyncio.run(admit()) == ("ours", "id", "a prompt")
