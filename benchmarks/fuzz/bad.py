"""Requests over HTTP that nobody can serve, of every kind, and what the answer has to say."""

import json
import random
from dataclasses import dataclass
from typing import Any

MODEL = "soak"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@dataclass(frozen=True)
class Bad:
    """What is wrong, and what its answer has.

    Attributes:
        path: of the endpoint.
        content: the body as sent.
        says: a part of the answer, which names what is wrong.
        status: of the answer.
    """

    path: str
    content: bytes
    says: str
    status: int = 400


_RECURSIVE = {"$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/a"}}}, "$ref": "#/$defs/a"}
_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"vllm_xargs": {"dllm_policy": "none"}}, "dllm_policy is 'none'"),
    ({"vllm_xargs": {"dllm_polcy": "static"}}, "dllm_polcy is not known"),
    ({"vllm_xargs": {"dllm_threshold": 2}}, "dllm_threshold is 2"),
    ({"vllm_xargs": {"dllm_policy": "static", "dllm_factor": 1.0}}, "does not use it"),
    ({"vllm_xargs": {"dllm_policy": "static", "dllm_steps": 10**6}}, "dllm_steps is 1000000"),
    ({"vllm_xargs": {"dllm_stream": "denoising"}}, "dllm_stream"),  # without a stream
    ({"vllm_xargs": {"dllm_budget": -1}}, "dllm_budget is -1"),
    ({"vllm_xargs": {"vllm_dllm_automaton": "x"}}, "vllm_dllm_automaton is set"),
    ({"dllm_policy": "static"}, "dllm_policy"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": "many"}, "max_tokens"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": 1e9}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_k": -7}, "top_k"),
    ({"min_p": 3}, "min_p"),
    ({"n": 0}, "n"),
    ({"seed": "x"}, "seed"),
    ({"presence_penalty": 99}, "presence_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"logit_bias": {"99999999": 1}}, "logit_bias"),
    ({"allowed_token_ids": [99999999]}, "allowed_token_ids"),
    ({"min_tokens": 10**6}, "min_tokens"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"structured_outputs": {"grammar": "root ::= a"}}, "a grammar is no regular language"),
    ({"structured_outputs": {"regex": "("}}, "no regular expression that can be built"),
    ({"structured_outputs": {"regex": "(a|b)*a(a|b){15}"}}, "more than 20000 states"),
    ({"structured_outputs": {"regex": "a{500}"}}, "the shortest answer that meets"),
    ({"structured_outputs": {"json": _RECURSIVE}}, "leads back to itself"),
    ({"structured_outputs": {"json": {"type": "string", "format": "uri"}}}, "format is 'uri'"),
    ({"structured_outputs": {"json": "{"}}, "is no JSON"),
    ({"structured_outputs": {"choice": []}}, "choice is []"),
    ({"structured_outputs": {"regex": "a"}, "min_tokens": 3}, "min_tokens is 3 beside structured output"),
]
_PROMPTS: list[tuple[Any, str]] = [
    ([], "prompt"),
    ([99999999], "99999999"),
    ([-1], "-1"),
    ([5] * 5000, "prompt"),
    ({"a": 1}, "prompt"),
    ([[5], "a"], "prompt"),
    ("\ud800", "prompt"),
]


def draw_bad(rng: random.Random) -> Bad:
    """Draw one."""
    body = {"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 8}
    form = rng.choice(["field", "field", "field", "field", "prompt", "whole"])
    if form == "field":
        fields, says = rng.choice(_FIELDS)
        return Bad(COMPLETIONS, json.dumps({**body, **fields}).encode(), says)
    if form == "prompt":
        prompt, says = rng.choice(_PROMPTS)
        return Bad(COMPLETIONS, json.dumps({**body, "prompt": prompt}).encode(), says)
    chat = {"model": MODEL, "max_tokens": 8, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}
    return rng.choice(
        [
            Bad(COMPLETIONS, b'{"model": "soak", "prompt', "JSON"),
            Bad(COMPLETIONS, b"\xff\xfe", "JSON"),
            Bad(COMPLETIONS, b"[" * 3000, "JSON"),
            Bad(COMPLETIONS, json.dumps({**body, "model": "other"}).encode(), "other", 404),
            Bad("/v1/completion", json.dumps(body).encode(), "Not Found", 404),
            Bad(CHAT, json.dumps({**chat}).encode(), "messages[0].content[0]"),
            Bad(CHAT, json.dumps({**chat, "messages": "hello"}).encode(), "messages"),
            Bad(CHAT, json.dumps({**chat, "messages": []}).encode(), "messages"),
        ]
    )
