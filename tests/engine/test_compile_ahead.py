"""A server's constraints are compiled in threads, once, and admission finds them: the event loop is never held up."""

import asyncio
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.exceptions import QueueOverflowError
from vllm.sampling_params import StructuredOutputsParams

from tests.engine.test_structured import processor
from vllm_dllm.constraint.regex import ConstraintError, UnfinishedError, kept
from vllm_dllm.engine import compile_ahead, structured
from vllm_dllm.engine.compile_ahead import _compiling, _compiling_each
from vllm_dllm.engine.refusals import RequestError

EOS, STOP = 1, 105


class Chat:
    """One of vLLM's handlers, as far as it is read."""

    default_sampling_params: Any = None

    def __init__(self) -> None:
        own = processor()
        own.generation_config_fields = {"eos_token_id": [STOP]}
        own.renderer = SimpleNamespace(get_eos_token_id=lambda: EOS)
        own.vllm_config.scheduler_config = self.limits = SimpleNamespace(max_num_queued_reqs=None)
        self.engine_client, self.model_config = SimpleNamespace(input_processor=own), own.model_config

    @_compiling
    async def render(self, request: Any) -> str:
        request.structured_outputs = request.written or request.structured_outputs  # as its tool parser does
        return f"rendered {request.name}"

    @_compiling_each
    async def render_batch(self, request: Any) -> Any:
        return request.each, "rendered"


def asking(regex: str | None, name: str = "a", **fields: Any) -> Any:
    def to_sampling_params(max_tokens: int, defaults: Any) -> SamplingParams:
        return SamplingParams(max_tokens=max_tokens, structured_outputs=request.structured_outputs)

    def dumped(include: set[str]) -> dict[str, Any]:
        return {each: getattr(request, each, None) for each in include}

    asked = None if regex is None else StructuredOutputsParams(regex=regex)
    request = SimpleNamespace(name=name, structured_outputs=asked, written=None, model_dump=dumped, **fields)
    request.to_sampling_params = to_sampling_params
    return request


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


class Held:
    """Expressions that begin with a "b" are not compiled before they may be."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.may_go_on = threading.Event()
        self._over_bytes: Callable[..., Any] = structured._over_bytes

    def over_bytes(self, kind: str, value: str, space: str) -> Any:
        self.begun.append(value)
        assert not value.startswith("b") or self.may_go_on.wait(60)
        return self._over_bytes(kind, value, space)

    async def until(self, num_begun: int) -> None:
        while len(self.begun) < num_begun:
            await asyncio.sleep(0.001)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Held:
    """What is compiled."""
    held = Held()
    monkeypatch.setattr(structured, "_over_bytes", held.over_bytes)
    return held


def test_the_loop_runs_on_while_a_constraint_is_compiled(held: Held, compiled: list[str]) -> None:
    chat = Chat()

    async def main() -> list[str]:
        same = [asyncio.create_task(chat.render(asking("ba{3}", str(i)))) for i in range(5)]
        await held.until(1)
        other = await chat.render(asking(None))  # while all of them wait
        await chat.render(asking("a{3}b"))  # in the other thread
        assert not any(task.done() for task in same)
        held.may_go_on.set()
        return [other, *await asyncio.gather(*same)]

    assert asyncio.run(main()) == ["rendered a", *(f"rendered {i}" for i in range(5))]
    assert len(compiled) == 2
    assert all(name.startswith("compile-constraint") for name in compiled)
    for regex in ("a{3}b", "ba{3}"):
        assert structured.SENT in (admit(chat.engine_client.input_processor, regex).extra_args or {})
    assert len(compiled) == 2, "admission compiled it again"


def test_each_request_of_a_batch_is_compiled_ahead(compiled: list[str]) -> None:
    chat = Chat()
    each = [asking("a{4}"), asking("a{4}"), asking("a{5}"), asking(None)]
    assert asyncio.run(chat.render_batch(SimpleNamespace(each=each))) == (each, "rendered")
    for regex in ("a{4}", "a{5}"):
        admit(chat.engine_client.input_processor, regex)
    assert len(compiled) == 2
    assert all(name.startswith("compile-constraint") for name in compiled)


def test_what_is_kept_waits_for_nobody_and_what_nobody_waits_for_is_left(held: Held) -> None:
    chat = Chat()
    chat.limits.max_num_queued_reqs = 4

    async def main() -> None:
        await chat.render(asking("a{6}"))
        tasks = [asyncio.create_task(chat.render(asking(f"b{{{n}}}"))) for n in (1, 2, 3, 3)]
        await held.until(3)  # both threads have one
        assert await chat.render(asking("a{6}", "kept")) == "rendered kept"
        with pytest.raises(QueueOverflowError):
            await chat.render(asking("a{7}"))
        tasks[2].cancel()  # the other one waits for it, too
        gone = asyncio.create_task(chat.render(asking("b{4}")))
        await asyncio.sleep(0.01)
        gone.cancel()
        await asyncio.gather(gone, tasks[2], return_exceptions=True)
        held.may_go_on.set()
        await asyncio.gather(*tasks[:2], tasks[3])
        await chat.render(asking("a{7}"))

    asyncio.run(main())
    assert held.begun[0] == "a{6}"
    assert sorted(held.begun) == ["a{6}", "a{7}", "b{1}", "b{2}", "b{3}"]
    assert not compile_ahead._jobs


def test_what_a_busy_machine_did_not_compile_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []

    def busy(*args: Any, **_options: Any) -> None:
        runs.append(args)
        raise subprocess.TimeoutExpired("build", 60)

    chat = Chat()
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", busy)
        with pytest.raises(
            RequestError, match=r"cannot be enforced \(regex\): it was not built within 60 s"
        ) as refused:
            asyncio.run(chat.render(asking("a{8}")))
    assert refused.value.parameter == "structured_outputs"
    assert len(runs) == 1
    assert asyncio.run(chat.render(asking("a{8}", "later"))) == "rendered later"


def test_what_is_wrong_is_told_by_admission() -> None:
    chat = Chat()
    assert asyncio.run(chat.render(asking("(", "wrong"))) == "rendered wrong"
    with pytest.raises(RequestError, match="no regular expression that can be built"):
        admit(chat.engine_client.input_processor, "(")
    malformed = asking("a")
    malformed.to_sampling_params = lambda *_: SamplingParams(temperature=-1)
    assert asyncio.run(chat.render(malformed)) == "rendered a"


def test_strict_tools_have_to_be_asked_for_by_the_parser() -> None:
    tools = [{"type": "function", "function": {"name": "f", "strict": True}}]
    tag = StructuredOutputsParams(structural_tag='{"type": "structural_tag", "format": {"type": "any_text"}}')
    for other in (None, "a+"):  # what else is asked for is not what calls look like
        free = asking(other, tools=tools, tool_choice="auto")
        with pytest.raises(RequestError, match=r"^tools\[0\]\.function\.strict is True where no tool is forced"):
            asyncio.run(Chat().render(free))
        forced = asking(other, tools=tools, tool_choice="required")
        with pytest.raises(RequestError, match=r"^tools\[0\]\.function\.strict is True where a tool is forced"):
            asyncio.run(Chat().render(forced))
    own = asking(None, tools=tools, tool_choice="auto")
    own.structured_outputs = tag  # the client's
    with pytest.raises(RequestError, match="where no tool is forced"):
        asyncio.run(Chat().render(own))
    for choice, written in (("auto", tag), ("required", tag), ("required", StructuredOutputsParams(json={}))):
        enforced = asking("a+", "strict", tools=tools, tool_choice=choice)
        enforced.written = written
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
