"""A server compiles what an answer has to meet in threads of their own, before it admits the request.

vLLM's handlers of requests make sampling parameters and call `AsyncLLM.generate` in one go, on the event loop that all
requests share; a constraint that is new would hold it up for as long as it takes to compile. So it is compiled where
they wait for the prompt to be tokenized, and is kept by then.
"""

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from vllm.exceptions import QueueOverflowError, VLLMClientError
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from vllm_dllm.constraint.regex import ConstraintError, UnfinishedError
from vllm_dllm.engine import structured
from vllm_dllm.engine.configs import is_ours
from vllm_dllm.engine.patches import wrap
from vllm_dllm.engine.refusals import refuse_strict_tools

NUM_THREADS = 2
"""Each may have a process that compiles an expression, for up to `regex.CPU_SECONDS`."""

_FIELDS = ("response_format", "structured_outputs", "tools", "text")
"""Of the APIs' requests, of which a structure is made."""

_WRITTEN = ("structured_outputs", "text")
"""Those of them that tool parsers write what they ask for into."""

_threads = ThreadPoolExecutor(NUM_THREADS, "compile-constraint")


@dataclass(slots=True)
class _Job:
    """A constraint that is compiled, or waits for a thread."""

    done: asyncio.Future[UnfinishedError | None]
    num_requests: int = 0  # that wait for it


_jobs: dict[structured.Source, _Job] = {}


def install() -> None:
    """Wrap the methods of vLLM's server that tokenize prompts."""
    wrap("OpenAIServingChat.render_chat_request", _compiling)
    wrap("OpenAIServingChatBatch.render_batch_chat_request", _compiling_each)
    wrap("OpenAIServingCompletion.render_completion_request", _compiling)
    wrap("OpenAIServingResponses._render_resolved_response_inputs", _compiling)


def _compiling(original: Callable[..., Any]) -> Callable[..., Any]:
    async def wrapper(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        before = [getattr(request, name, None) for name in _WRITTEN]
        rendered = await original(self, request, *args, **kwargs)
        if is_ours(self.model_config) and not hasattr(rendered, "error"):
            written = [
                name for name, value in zip(_WRITTEN, before, strict=True) if getattr(request, name, None) is not value
            ]
            await compile_ahead(self, request, written)
        return rendered

    return wrapper


def _compiling_each(original: Callable[..., Any]) -> Callable[..., Any]:
    """A batch is made of requests of one conversation each, which are the first thing returned."""

    async def wrapper(self: Any, request: Any) -> Any:
        rendered = await original(self, request)
        if is_ours(self.model_config) and not hasattr(rendered, "error"):
            for each in rendered[0]:
                await compile_ahead(self, each)
        return rendered

    return wrapper


async def compile_ahead(serving: Any, request: Any, written: Iterable[str] = ()) -> None:
    """Compile what a request asks for, if it is well formed: its admission says what is wrong.

    Args:
        serving: one of vLLM's handlers.
        request: of its API.
        written: the fields that its tool parser wrote.

    Raises: RequestError for strict tools that are not enforced, and for what a busy machine could not compile;
        QueueOverflowError where as many requests wait for it as the server may queue.
    """
    if not any(getattr(request, name, None) for name in _FIELDS):
        return
    processor = serving.engine_client.input_processor
    try:
        params = request.to_sampling_params(1, serving.default_sampling_params)
    except (VLLMClientError, ValueError, TypeError):
        return
    asked = params.structured_outputs
    if getattr(request, "tools", None):
        is_tag = asked is not None and asked.structural_tag is not None and "structured_outputs" in written
        body = request.model_dump(include={"tools", "tool_choice"})
        refuse_strict_tools(body, in_text=is_tag, if_forced=bool(written))
    if asked is not None:
        await _compile_ahead(processor, params, asked)


async def _compile_ahead(processor: Any, params: SamplingParams, asked: StructuredOutputsParams) -> None:
    own = params.clone()
    # As admission does: tokens that end a reply are part of what is compiled.
    own.update_from_generation_config(processor.generation_config_fields, processor.renderer.get_eos_token_id())
    try:
        source = structured.source_of(processor, own, asked)
        if structured.is_kept(source):
            return
    except ConstraintError:
        return
    limit = processor.vllm_config.scheduler_config.max_num_queued_reqs
    if limit is not None and sum(job.num_requests for job in _jobs.values()) >= limit:
        raise QueueOverflowError
    error = await _in_thread(source)
    if error is not None:  # it is not kept: admission would try again, on the event loop
        raise structured.refusal(asked, error)


async def _in_thread(source: structured.Source) -> UnfinishedError | None:
    """Wait for one of the threads to compile something; where nobody waits any more, none begins to."""
    job = _jobs.get(source)
    if job is None:
        done = asyncio.get_running_loop().run_in_executor(_threads, _compile, source)
        job = _jobs[source] = _Job(done)
    job.num_requests += 1
    try:
        return await asyncio.shield(job.done)
    finally:
        job.num_requests -= 1
        if not job.num_requests:
            del _jobs[source]
            job.done.cancel()


def _compile(source: structured.Source) -> UnfinishedError | None:
    try:
        structured.compiled(source)
    except UnfinishedError as error:
        return error
    except ConstraintError:  # kept, for admission to say
        pass
    return None
