"""A server's own part: a bad request gets its HTTP 400 before a streamed reply begins, in the words of its client, and
a request in flight its error when the server ends.
"""

import re
import sys
import weakref
from collections.abc import AsyncGenerator, Callable
from http import HTTPStatus
from typing import Any

from pydantic import ValidationError
from vllm.config import ModelConfig
from vllm.sampling_params import RequestOutputKind
from vllm.utils.async_utils import run_in_loop
from vllm.v1.engine.exceptions import EngineDeadError

from vllm_dllm.engine import compile_ahead
from vllm_dllm.engine.configs import is_ours
from vllm_dllm.engine.explain import explain_validation
from vllm_dllm.engine.patches import wrap
from vllm_dllm.engine.reply_stream import heard, with_canvases
from vllm_dllm.engine.request import check_early, counting

_SENT_AS = {"max_completion_tokens": "max_tokens", "stop": "stop_sequences"}
"""Fields of the chat API -> what the Messages API calls them."""

_APPS: list[Any] = []
"""Of the servers with one of our models in this process, at most one."""

_STOPPED: weakref.WeakSet[Any] = weakref.WeakSet()
"""Engine clients that have been shut down. vLLM's server does so twice, and the engine that it stopped is then dead."""


def install() -> None:
    """Wrap the methods of vLLM's server that every API's requests pass; those for other models pass unchanged."""
    wrap("entry.build_app", _with_bodies_checked)
    wrap("AnthropicServingMessages.create_messages", _without_traceback)
    wrap("AnthropicServingMessages.count_tokens", _only_counted)
    wrap("AsyncLLM.generate", _at_once)
    wrap("AsyncLLM.shutdown", _with_errors_sent)
    wrap("OpenAIServingChat.chat_completion_stream_generator", with_canvases("chat"))
    wrap("OpenAIServingCompletion.completion_stream_generator", with_canvases("completion"))
    wrap("OpenAIServingResponses._generate_with_builtin_tools", _response_at_once)
    compile_ahead.install()
    if "vllm.entrypoints.launchers.run_batch" in sys.modules:  # a program of its own
        wrap("run_batch.run_batch", _with_lines_checked)


def _with_bodies_checked(original: Callable[..., Any]) -> Callable[..., Any]:
    """The app of a server with one of our models checks bodies; that of another is as vLLM made it."""

    def wrapper(args: Any, supported_tasks: Any = None, model_config: ModelConfig | None = None) -> Any:
        app = original(args, supported_tasks, model_config)
        if model_config is not None and is_ours(model_config):
            from vllm_dllm.engine.bodies import check_in

            check_in(app)
            _APPS.append(app)
        return app

    return wrapper


def _with_lines_checked(original: Callable[..., Any]) -> Callable[..., Any]:
    async def wrapper(engine_client: Any, *args: Any) -> Any:  # 0.33 adds the file and its number of lines
        if is_ours(engine_client.model_config):
            from vllm_dllm.engine.bodies import check_lines

            check_lines()
        return await original(engine_client, *args)

    return wrapper


def _without_traceback(original: Callable[..., Any]) -> Callable[..., Any]:
    """This API logs whatever is raised with its traceback, and names the fields of the chat API that it calls."""

    async def wrapper(self: Any, request: Any, raw_request: Any = None) -> Any:
        try:
            return await original(self, request, raw_request)
        except Exception as error:
            reply = self.create_error_response(_explained(error)) if is_ours(self.model_config) else None
            if reply is None or reply.error.code >= HTTPStatus.INTERNAL_SERVER_ERROR:
                raise
        for name, sent in _SENT_AS.items():
            if re.match(rf"{name}\b", reply.error.message):
                reply.error.message = re.sub(rf"\b{name}\b", sent, reply.error.message)
        return reply

    return wrapper


def _explained(error: Exception) -> Exception:
    if not isinstance(error, ValidationError):
        return error
    return explain_validation(error.errors(), {each["loc"][0]: each["input"] for each in error.errors() if each["loc"]})


def _only_counted(original: Callable[..., Any]) -> Callable[..., Any]:
    quiet = _without_traceback(original)

    async def wrapper(self: Any, request: Any, raw_request: Any = None) -> Any:
        with counting():
            return await quiet(self, request, raw_request)

    return wrapper


def _at_once(original: Callable[..., Any]) -> Callable[..., Any]:
    """A generator runs when its first output is asked for, which for a stream is behind the HTTP status."""

    def wrapper(self: Any, prompt: Any, sampling_params: Any, request_id: str, **options: Any) -> AsyncGenerator[Any]:
        seen_early = {name: options[name] for name in ("lora_request", "data_parallel_rank") if name in options}
        check_early(self.input_processor, prompt, sampling_params, **seen_early)
        outputs: AsyncGenerator[Any] = original(self, prompt, sampling_params, request_id, **options)
        is_streamed = getattr(sampling_params, "output_kind", None) == RequestOutputKind.DELTA
        return heard(outputs) if is_streamed and _APPS and is_ours(self.model_config) else outputs

    return wrapper


def _response_at_once(original: Callable[..., Any]) -> Callable[..., Any]:
    """The Responses API calls `AsyncLLM.generate` inside of a generator of its own."""

    def wrapper(self: Any, request_id: str, engine_input: Any, sampling_params: Any, *args: Any, **options: Any) -> Any:
        check_early(self.engine_client.input_processor, engine_input, sampling_params)
        return original(self, request_id, engine_input, sampling_params, *args, **options)

    return wrapper


def _with_errors_sent(original: Callable[..., None]) -> Callable[..., None]:
    """vLLM reports the engine's end to the task that hands outputs to the requests, and cancels this task at once.

    Where the event loop sees both together, as under load, the requests in flight hear of nothing: their clients wait
    forever, and the server waits for them.
    """

    def wrapper(self: Any, timeout: float | None = None) -> None:
        handler = getattr(self, "output_handler", None)  # None where no request came, or `__init__` failed
        was_dead = handler is not None and self not in _STOPPED and self.engine_core.resources.engine_dead
        _STOPPED.add(self)
        original(self, timeout)
        if handler is not None and is_ours(self.model_config):
            run_in_loop(handler.get_loop(), self.output_processor.propagate_error, EngineDeadError())
        if was_dead and _APPS:
            # vLLM's server would end with status 0, as one that was told to end: nobody would start it again.
            raise SystemExit("The engine has ended by an error, which stands above; this server ends with status 1.")

    return wrapper
