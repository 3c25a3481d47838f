"""A server compiles what an answer has to meet in threads of their own, before it admits the request.

vLLM's handlers of requests make sampling parameters and call `AsyncLLM.generate` in one go, on the event loop that all
requests share; a constraint that is new would hold it up for as long as it takes to compile. So it is compiled where
they wait for the prompt to be tokenized, and is kept by then.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from vllm.exceptions import VLLMClientError
from vllm.sampling_params import SamplingParams

from vllm_dllm.constraint.regex import ConstraintError
from vllm_dllm.engine import structured
from vllm_dllm.engine.configs import is_ours
from vllm_dllm.engine.patches import wrap
from vllm_dllm.engine.refusals import refuse_strict_tools

NUM_THREADS = 2
"""Each may have a process that compiles an expression, for up to `regex.CPU_SECONDS`."""

_FIELDS = ("response_format", "structured_outputs", "tools", "text")
"""Of the APIs' requests, of which a structure is made."""

_threads = ThreadPoolExecutor(NUM_THREADS, "compile-constraint")


def install() -> None:
    """Wrap the methods of vLLM's server that tokenize prompts."""
    wrap("OpenAIServingChat.render_chat_request", _compiling)
    wrap("OpenAIServingCompletion.render_completion_request", _compiling)
    wrap("OpenAIServingResponses._render_resolved_response_inputs", _compiling)


def _compiling(original: Callable[..., Any]) -> Callable[..., Any]:
    async def wrapper(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        rendered = await original(self, request, *args, **kwargs)  # tool parsers say in it what they ask for
        if is_ours(self.model_config) and any(getattr(request, name, None) for name in _FIELDS):
            await compile_ahead(self, request)
        return rendered

    return wrapper


async def compile_ahead(serving: Any, request: Any) -> None:
    """Compile what a request asks for, if it is well formed: its admission says what is wrong.

    Args:
        serving: one of vLLM's handlers.
        request: of its API.

    Raises: RequestError for strict tools of which nothing is asked.
    """
    processor = serving.engine_client.input_processor
    try:
        params = request.to_sampling_params(1, serving.default_sampling_params)
    except (VLLMClientError, ValueError, TypeError):
        return
    asked = params.structured_outputs
    if asked is None:
        refuse_strict_tools(request.model_dump(include={"tools", "tool_choice"}))
    else:
        await asyncio.get_running_loop().run_in_executor(_threads, _compile, processor, params, asked)


def _compile(processor: Any, params: SamplingParams, asked: Any) -> None:
    own = params.clone()
    # As admission does: tokens that end a reply are part of what is compiled.
    own.update_from_generation_config(processor.generation_config_fields, processor.renderer.get_eos_token_id())
    with suppress(ConstraintError):
        structured.compiled(processor, own, asked)
