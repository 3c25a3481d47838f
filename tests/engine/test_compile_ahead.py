"""A server's constraints are compiled in threads, once, and admission finds them: the event loop is never held up."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from tests.engine.test_structured import processor
from vllm_dllm.constraint.regex import ConstraintError, UnfinishedError, kept
from vllm_dllm.engine import compile_ahead, structured
from vllm_dllm.engine.compile_ahead import _compiling
from vllm_dllm.engine.refusals import RequestError

EOS, STOP = 1, 105


class Chat:
    """One of vLLM's handlers, as far as it is read."""

    default_sampling_params: Any = None

    def __init__(self) -> None:
        own = processor()
        own.generation_config_fields = {"eos_token_id": [STOP]}
        own.renderer = SimpleNamespace(get_eos_token_id=lambda: EOS)
        self.engine_client, self.model_config = SimpleNamespace(input_processor=own), own.model_config

    @_compiling
    async def render(self, request: Any) -> str:
        return f"rendered {request.name}"


def asking(regex: str | None, name: str = "a") -> Any:
    asked = None if regex is None else StructuredOutputsParams(regex=regex)

    def to_sampling_params(max_tokens: int, defaults: Any) -> SamplingParams:
        return SamplingParams(max_tokens=max_tokens, structured_outputs=asked)

    return SimpleNamespace(name=name, structured_outputs=asked, to_sampling_params=to_sampling_params)


def admit(own: Any, regex: str) -> SamplingParams:
    """Do what vLLM and `finish_admission` do with a request's parameters."""
    params = SamplingParams(max_tokens=8)
    params.update_from_generation_config({"eos_token_id": [STOP]}, EOS)
    structured.put_in(own, params, StructuredOutputsParams(regex=regex))
    return params


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The threads that compiled something."""
    names: list[str] = []
    compile_tokens = structured.compile_tokens

    def watched(*args: Any) -> Any:
        names.append(threading.current_thread().name)
        return compile_tokens(*args)

    monkeypatch.setattr(structured, "compile_tokens", watched)
    return names


def test_the_loop_runs_on_while_a_constraint_is_compiled(monkeypatch: pytest.MonkeyPatch, compiled: list[str]) -> None:
    begun, may_go_on, over_bytes = threading.Event(), threading.Event(), structured._over_bytes

    def slow(*args: Any) -> Any:
        begun.set()
        assert may_go_on.wait(60)
        return over_bytes(*args)

    monkeypatch.setattr(structured, "_over_bytes", slow)
    chat = Chat()

    async def main() -> list[str]:
        same = [asyncio.create_task(chat.render(asking("a{3}b", str(i)))) for i in range(5)]
        while not begun.is_set():
            await asyncio.sleep(0.001)
        other = await chat.render(asking(None))  # while all of them wait
        assert not any(task.done() for task in same)
        may_go_on.set()
        return [other, *await asyncio.gather(*same)]

    assert asyncio.run(main()) == ["rendered a", *(f"rendered {i}" for i in range(5))]
    assert len(compiled) == 1
    assert compiled[0].startswith("compile-constraint")
    assert structured.SENT in (admit(chat.engine_client.input_processor, "a{3}b").extra_args or {})
    assert len(compiled) == 1, "admission compiled it again"


def test_what_is_wrong_is_told_by_admission() -> None:
    chat = Chat()
    assert asyncio.run(chat.render(asking("(", "wrong"))) == "rendered wrong"
    with pytest.raises(RequestError, match="no regular expression that can be built"):
        admit(chat.engine_client.input_processor, "(")
    malformed = asking("a")
    malformed.to_sampling_params = lambda *_: SamplingParams(temperature=-1)
    assert asyncio.run(chat.render(malformed)) == "rendered a"


def test_strict_tools_have_to_be_asked_for_by_the_parser() -> None:
    tool = {"type": "function", "function": {"name": "f", "strict": True}}
    free = asking(None, "strict")
    free.tools, free.model_dump = [tool], lambda include: {"tools": [tool], "tool_choice": "auto"}
    with pytest.raises(RequestError, match=r"^tools\[0\]\.function\.strict is True where no tool is forced"):
        asyncio.run(Chat().render(free))
    enforced = asking("a+", "strict")
    enforced.tools = [tool]
    assert asyncio.run(Chat().render(enforced)) == "rendered strict"


def test_another_models_requests_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_ahead, "is_ours", lambda config: False)
    monkeypatch.setattr(compile_ahead, "compile_ahead", None)
    assert asyncio.run(Chat().render(asking("a"))) == "rendered a"


def test_threads_that_ask_for_the_same_wait_for_one_and_others_do_not() -> None:
    may_go_on, calls, inside = threading.Event(), [], threading.Event()

    @kept(4)
    def slow(name: str) -> str:
        calls.append(name)
        if name == "slow":
            inside.set()
            assert may_go_on.wait(60)
        if name == "wrong":
            raise ConstraintError("no")
        if name == "busy":
            raise UnfinishedError("later")
        return name

    with ThreadPoolExecutor(4) as pool:
        same = [pool.submit(slow, "slow") for _ in range(3)]
        assert inside.wait(60)
        assert pool.submit(slow, "quick").result(60) == "quick"
        may_go_on.set()
        assert [each.result(60) for each in same] == ["slow"] * 3
    for name in ("wrong", "busy") * 2:
        with pytest.raises(ConstraintError):
            slow(name)
    assert sorted(calls) == ["busy", "busy", "quick", "slow", "wrong"]
