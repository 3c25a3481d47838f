"""Generated requests over HTTP, and how their answers are read: whole or streamed, one choice or several."""

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Any

import httpx

from benchmarks.fuzz.asked import draw_asked
from benchmarks.fuzz.bad import CHAT, COMPLETIONS, MODEL, Bad, draw_bad
from benchmarks.fuzz.requests import Drawn, Shape, check_pins, draw_request, needed_tokens

CALLS_EACH = 8
"""With one constraint, so that a server keeps what it compiled."""
BAD_SHARE = 0.06

Answer = list[list[int]]
"""Of each choice, its tokens."""


@dataclass(frozen=True)
class Call:
    """A request over HTTP that can be served, or else is refused in the same words each time.

    Attributes:
        path: of the endpoint.
        body: as JSON.
        check: raises ValueError for the text of a choice that is not what was asked for.
    """

    path: str
    body: dict[str, Any]
    check: Callable[[str], None] | None


def draw_calls(seed: int, count: int, shape: Shape, policies: Sequence[str]) -> list[Call | Bad]:
    """Draw some, of the policies given."""
    calls = []
    for number in range(count):
        rng = random.Random(f"{seed}/call {number}")
        calls.append(draw_bad(rng) if rng.random() < BAD_SHARE else _draw(rng, seed, number, shape, policies))
    return calls


def _draw(rng: random.Random, seed: int, number: int, shape: Shape, policies: Sequence[str]) -> Call:
    asked = draw_asked(random.Random(f"{seed}/constraint {number // CALLS_EACH}"))
    drawn = draw_request(rng, shape, asked if rng.random() < 0.4 else None, [])
    while drawn.options["dllm_policy"] not in policies:
        drawn = draw_request(rng, shape, drawn.asked, [])
    options = dict(drawn.options)
    if rng.random() < 0.1:
        options["dllm_speculation"] = False
        options.pop("dllm_budget", None)
    body = {"model": MODEL, **drawn.sampling, "vllm_xargs": options, "return_token_ids": True}
    body["n"] = rng.choice([1, 1, 1, 1, 2, 3])
    is_chat = rng.random() < 0.3
    if is_chat:
        left, right = rng.randint(1, 99), rng.randint(1, 99)
        if "logprobs" in body:
            body |= {"logprobs": True, "top_logprobs": body["logprobs"]}
        body["messages"] = [{"role": "user", "content": f"{left} + {right} = ?"}]
    else:
        body["prompt"] = drawn.prompt
    return Call(
        CHAT if is_chat else COMPLETIONS, body | _structure(drawn, is_chat), asked.check if drawn.asked else None
    )


def _structure(drawn: Drawn, is_chat: bool) -> dict[str, Any]:
    if drawn.asked is None:
        return {}
    params = drawn.asked.params
    if is_chat and params.keys() == {"json"} and not isinstance(params["json"], str):
        return {"response_format": {"type": "json_schema", "json_schema": {"name": "it", "schema": params["json"]}}}
    if is_chat and params.keys() == {"json_object"}:
        return {"response_format": {"type": "json_object"}}
    return {"structured_outputs": params}


def fitted(call: Call | Bad, answer: Answer | str) -> Call | None:
    """Return a request again with just as many tokens as its refusal says are needed; None: it says nothing of it."""
    needed = needed_tokens(answer) if isinstance(call, Call) and isinstance(answer, str) else None
    if needed is None:
        return None
    assert isinstance(call, Call)
    options = {name: value for name, value in call.body["vllm_xargs"].items() if name != "dllm_steps"}
    return replace(call, body={**call.body, "max_tokens": needed, "vllm_xargs": options})


def shows_canvases(call: Call | Bad) -> bool:
    """Say whether a request may be streamed with its canvases."""
    return isinstance(call, Call) and call.body["n"] == 1


async def send(client: httpx.AsyncClient, call: Call | Bad, stream: str = "") -> Answer | str:
    """Send a request and read its answer; returns its tokens, or the message that refused it.

    Args:
        client: of the server.
        call: the request.
        stream: "", "usual", or "denoising", with the canvases.

    Raises: RuntimeError for an answer that is not whole or not what was asked for; httpx.HTTPError.
    """
    if isinstance(call, Bad):
        status, text = await _read(client, call.path, call.content)
        if status != call.status or call.says not in text:
            raise RuntimeError(f"not refused with {call.status} and {call.says!r}: {status} {text[:300]}")
        return call.says
    body = call.body
    if stream:
        options = body["vllm_xargs"] | ({"dllm_stream": "denoising"} if stream == "denoising" else {})
        body = {**body, "stream": True, "vllm_xargs": options}
    status, text = await _read(client, call.path, json.dumps(body).encode())
    if status == HTTPStatus.BAD_REQUEST:
        return str(json.loads(text)["error"]["message"])
    if status != HTTPStatus.OK or '"error"' in text:
        raise RuntimeError(f"status {status}: {text[:300]}")
    if stream and not text.rstrip().endswith("data: [DONE]"):
        raise RuntimeError(f"not whole: {text[-300:]}")
    return read_answer(call, re.findall(r"^data: (\{.*)$", text, re.MULTILINE) if stream else [text])


async def _read(client: httpx.AsyncClient, path: str, content: bytes) -> tuple[int, str]:
    headers = {"Content-Type": "application/json"}
    async with client.stream("POST", path, content=content, headers=headers) as reply:
        return reply.status_code, (await reply.aread()).decode()


def read_answer(call: Call, chunks: Sequence[str]) -> Answer:
    """Put together the chunks of a reply, and check the text of each choice."""
    num_choices = call.body["n"]
    tokens: Answer = [[] for _ in range(num_choices)]
    texts, is_finished = [""] * num_choices, [False] * num_choices
    for choice in (choice for chunk in chunks for choice in json.loads(chunk)["choices"]):
        part = choice.get("message") or choice.get("delta") or choice
        tokens[choice["index"]] += choice.get("token_ids") or []
        texts[choice["index"]] += part.get("content") or part.get("text") or ""
        is_finished[choice["index"]] |= bool(choice["finish_reason"])
    if not all(is_finished):
        raise RuntimeError(f"not whole: {chunks[-1][-300:]}")
    try:
        for text, answer in zip(texts, tokens, strict=True):
            check_pins(call.body.get("vllm_xargs", {}), answer)
            if call.check is not None:
                call.check(text)
    except ValueError as error:
        raise RuntimeError(f"violated: {error}") from None
    return tokens
