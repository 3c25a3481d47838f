"""A server's own part: a bad request gets its HTTP 400 before a streamed reply begins, in the words of its client, and
a request in flight its error when the server ends.
"""

from collections.abc import AsyncGenerator, Callable
from http import HTTPStatus
from typing import Any

from vllm.config import ModelConfig
from vllm.utils.async_utils import run_in_loop
from vllm.v1.engine.exceptions import EngineDeadError

from vllm_dllm.engine.configs import is_ours
from vllm_dllm.engine.patches import wrap
from vllm_dllm.engine.refusals import RequestError, refuse_body, refuse_fields
from vllm_dllm.engine.request import check_early, counting

_GENERATING = (
    *("/v1/completions", "/v1/chat/completions", "/v1/chat/completions/batch", "/v1/responses", "/v1/messages"),
    *("/inference/v1/generate", "/generative_scoring", "/invocations", "/cohere/v2/chat"),
)
"""Where requests that ask for tokens go; beside each there may be a `/render`."""


def install() -> None:
    """Wrap the methods of vLLM's server that every API's requests pass; those for other models pass unchanged."""
    wrap("FastAPI.build_middleware_stack", _with_bodies_checked)
    wrap("BaseServing._check_model", _with_fields_checked)
    wrap("AnthropicServingMessages.create_messages", _without_traceback)
    wrap("AnthropicServingMessages.count_tokens", _only_counted)
    wrap("AsyncLLM.generate", _at_once)
    wrap("AsyncLLM.shutdown", _with_errors_sent)
    wrap("OpenAIServingResponses._generate_with_builtin_tools", _response_at_once)


def _with_bodies_checked(original: Callable[..., Any]) -> Callable[..., Any]:
    """An app builds its middleware when it starts; what all its APIs depend on checks a body before it is parsed."""
    from fastapi import Request
    from vllm.entrypoints.serve.utils.api_utils import validate_json_request

    async def check(raw_request: Request) -> None:
        await validate_json_request(raw_request)
        engine = getattr(raw_request.app.state, "engine_client", None)
        path = raw_request.url.path.removesuffix("/render")
        if engine is None or not is_ours(engine.model_config) or not path.endswith(_GENERATING):
            return
        try:
            body = await raw_request.json()
        except ValueError:
            return  # whoever parses it says so
        if isinstance(body, dict):
            _check_body(path, body)

    def wrapper(self: Any) -> Any:
        self.dependency_overrides.setdefault(validate_json_request, check)
        return original(self)

    return wrapper


def _check_body(path: str, body: dict[str, Any]) -> None:
    """Refuse what vLLM's class of the request would not show us, in the body that it is made of.

    Raises: RequestError.
    """
    if path.endswith("/inference/v1/generate"):
        body = {name: value for name, value in body.items() if name != "sampling_params"}
    refuse_body(body)
    if body.get("logprobs") is False:
        body["logprobs"] = None  # a number in the completions API, which would take it for 0


def _with_fields_checked(original: Callable[..., Any]) -> Callable[..., Any]:
    async def wrapper(self: Any, request: Any) -> Any:
        return await original(self, request) or _refusal(self, request)

    return wrapper


def _refusal(serving: Any, request: Any) -> Any:
    """Return vLLM's reply to a request with a field that is refused, or None."""
    model_config: ModelConfig = serving.model_config
    if not is_ours(model_config):
        return None
    try:
        refuse_fields(request)
    except RequestError as error:
        return serving.create_error_response(error)
    return None


def _without_traceback(original: Callable[..., Any]) -> Callable[..., Any]:
    """This API logs whatever is raised with its traceback, and sends requests on as those of another API."""

    async def wrapper(self: Any, request: Any, raw_request: Any = None) -> Any:
        if refusal := _refusal(self, request):
            return refusal
        try:
            return await original(self, request, raw_request)
        except Exception as error:
            reply = self.create_error_response(error) if is_ours(self.model_config) else None
            if reply is None or reply.error.code >= HTTPStatus.INTERNAL_SERVER_ERROR:
                raise
            return reply

    return wrapper


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
        return original(self, prompt, sampling_params, request_id, **options)

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
        original(self, timeout)
        if handler is not None and is_ours(self.model_config):
            run_in_loop(handler.get_loop(), self.output_processor.propagate_error, EngineDeadError())

    return wrapper
