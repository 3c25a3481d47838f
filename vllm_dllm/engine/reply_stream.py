"""What a streamed reply of `/v1/completions` and `/v1/chat/completions` has beside vLLM's: a request's numbers, in the
chunk that ends it, and its canvas as it is denoised where it asked for that.

vLLM's generators of chunks leave out a request's `kv_transfer_params`, and outputs without tokens. So what passes by
in `AsyncLLM.generate` is handed to the reply of the same HTTP request.
"""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing, suppress
from contextvars import ContextVar
from typing import Any

from vllm.entrypoints.anthropic.serving import AnthropicServingMessages

from vllm_dllm.engine.canvas_stream import is_watched
from vllm_dllm.engine.configs import is_ours

_NUMBERS = "kv_transfer_params"
_SO_FAR = ("nfe", "nfe_refresh", "proposed", "accepted")
_PREFIX, _SUFFIX = "data: ", "\n\n"
_OBJECTS = {"chat": "chat.completion.chunk", "completion": "text_completion"}


def _event(body: dict[str, Any]) -> str:
    return _PREFIX + json.dumps(body, separators=(",", ":"), ensure_ascii=False) + _SUFFIX


class _Reply:
    """A streamed reply under way: its chunks as they come, and what the request took so far."""

    def __init__(self, canvas_chunk: Callable[[Mapping[str, Any]], str]) -> None:
        self.chunks: asyncio.Queue[str | None] = asyncio.Queue()
        self.numbers: dict[str, Any] | None = None
        self._canvas_chunk = canvas_chunk

    def take(self, output: Any) -> dict[str, Any] | None:
        """Take what an output of vLLM's engine has beside its tokens; returns its canvas, with its numbers so far."""
        own = dict((output.kv_transfer_params or {}).get("dllm") or {})
        start, canvas, logprobs = (own.pop(name, None) for name in ("canvas_start", "canvas", "canvas_logprobs"))
        if own:
            self.numbers = {"dllm": own}
        if canvas is None:
            return None
        shown = {"start": start, "token_ids": canvas} | ({} if logprobs is None else {"logprobs": logprobs})
        return shown | {name: own[name] for name in _SO_FAR}

    def show(self, canvas: Mapping[str, Any], index: int) -> None:
        """Add a chunk with a canvas, of one of the choices."""
        self.chunks.put_nowait(self._canvas_chunk({"index": index, **canvas}))

    def finish(self, chunk: str) -> str:
        """Add the numbers to a chunk that ends a choice."""
        if self.numbers is None or '"finish_reason":"' not in chunk:
            return chunk
        return _event(json.loads(chunk.removeprefix(_PREFIX)) | {_NUMBERS: self.numbers})


class _Call:
    """A request to the engine, and the reply that it is part of."""

    reply: _Reply | None = None  # None: it is not streamed by one of these APIs
    place: int = 0  # of its prompt among the reply's


_CALLS: ContextVar[tuple[_Call, ...]] = ContextVar("calls", default=())
"""Of the HTTP request that is served, each of which has a context of its own."""


def heard(outputs: AsyncGenerator[Any]) -> AsyncGenerator[Any]:
    """Return a request's outputs as the reply that is streamed, if any, is to see them."""
    call = _Call()
    _CALLS.set((*_CALLS.get(), call))

    async def listen() -> AsyncGenerator[Any]:
        async with aclosing(outputs):
            async for output in outputs:
                canvas = call.reply and call.reply.take(output)
                if call.reply is None or output.finished or any(choice.token_ids for choice in output.outputs):
                    yield output
                if call.reply and canvas:  # it is of what lies behind those tokens
                    call.reply.show(canvas, call.place)

    return listen()


def with_canvases(kind: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make the wrapper of a generator of chunks, of the `chat` or the `completion` API."""

    def make(original: Callable[..., AsyncGenerator[str]]) -> Callable[..., Any]:
        def wrapper(self: Any, request: Any, *args: Any, **options: Any) -> AsyncGenerator[str]:
            if not is_ours(self.model_config) or isinstance(self, AnthropicServingMessages):
                return original(self, request, *args, **options)
            # Behind the request: the results, its id; in the completions API the prompts come first.
            request_id = args[1] if kind == "chat" else args[2]
            text_of = self.renderer.tokenizer.decode

            def canvas_chunk(canvas: Mapping[str, Any]) -> str:
                tokens = [None if token is None else text_of([token]) for token in canvas["token_ids"]]
                shown = {**canvas, "tokens": tokens}
                body = {"id": request_id, "object": _OBJECTS[kind], "created": int(time.time())}
                body |= {"model": request.model, "choices": [], "dllm_canvas": shown}
                return _event(body)

            reply, chunks = _Reply(canvas_chunk), original(self, request, *args, **options)
            for place, call in enumerate(_CALLS.get()):
                call.reply, call.place = reply, place
            _CALLS.set(())
            return (_joined if is_watched(request.vllm_xargs) else _finished)(reply, chunks)

        return wrapper

    return make


async def _finished(reply: _Reply, chunks: AsyncGenerator[str]) -> AsyncGenerator[str]:
    """Yield vLLM's chunks, with the numbers."""
    async with aclosing(chunks):
        async for chunk in chunks:
            yield reply.finish(chunk)


async def _joined(reply: _Reply, chunks: AsyncGenerator[str]) -> AsyncGenerator[str]:
    """Yield vLLM's chunks and ours as they come."""

    async def pump() -> None:
        try:
            async for chunk in chunks:
                reply.chunks.put_nowait(reply.finish(chunk))
        finally:
            reply.chunks.put_nowait(None)

    task = asyncio.create_task(pump())
    try:
        while (chunk := await reply.chunks.get()) is not None:
            yield chunk
        await task  # raises what ended it
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
