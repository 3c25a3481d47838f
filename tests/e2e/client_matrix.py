"""What of the OpenAI API works, tried with the official client against a running server: the table of docs/openai.md.

    python -m tests.e2e.client_matrix http://localhost:8000/v1

Each row sends a request and looks at what came of it.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import openai

QUESTION = [{"role": "user", "content": "61 + 27 = ?"}]
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}, "ok": {"type": "boolean"}},
    "required": ["n", "ok"],
    "additionalProperties": False,
}
CANVAS = "sum: <|mdm_mask*3|>!"
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}},
            "required": ["a"],
            "additionalProperties": False,
        },
    },
}


@dataclass(frozen=True)
class Server:
    """A server and one of its models."""

    client: openai.OpenAI
    model: str

    def chat(self, **changes: Any) -> Any:
        """Ask a question; `changes` are fields of the request, `extra` those that the client does not know."""
        body = {"model": self.model, "messages": QUESTION, "max_tokens": 16, "temperature": 0, **changes}
        return self.client.chat.completions.create(extra_body=body.pop("extra", None), **body)

    def complete(self, **changes: Any) -> Any:
        """The same by the completions API."""
        body = {"model": self.model, "prompt": "61 + 27 = ?", "max_tokens": 16, "temperature": 0, **changes}
        return self.client.completions.create(extra_body=body.pop("extra", None), **body)

    def respond(self, **changes: Any) -> Any:
        """The same by the Responses API."""
        body = {"model": self.model, "input": "61 + 27 = ?", "max_output_tokens": 16, "temperature": 0, **changes}
        return self.client.responses.create(extra_body=body.pop("extra", None), **body)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """Send JSON to any path of the server; raises as the client does."""
        return self.client.post(path, body={"model": self.model, **body}, cast_to=object)


Check = Callable[[Server], object]
"""Returns what is true where the feature works."""


def _text(reply: Any) -> str:
    return str(reply.choices[0].message.content)


def _is_of_schema(text: str) -> bool:
    value = json.loads(text)
    return set(value) == {"n", "ok"} and value["n"] in range(10) and isinstance(value["ok"], bool)


def _forced(choice: Any, *, is_strict: bool) -> Check:
    """Force a call: of a strict tool by its schema, else with any object."""
    tool = {**TOOL, "function": {**TOOL["function"], "strict": is_strict}}

    def check(server: Server) -> bool:
        reply = server.chat(tools=[tool], tool_choice=choice, max_tokens=64)
        (call,) = reply.choices[0].message.tool_calls
        arguments = json.loads(call.function.arguments)
        is_met = arguments["a"] in range(10) if is_strict else isinstance(arguments, dict)
        return call.function.name == "add" and is_met

    return check


def _same_twice(server: Server) -> bool:
    one, two = (_text(server.chat(temperature=1, seed=5)) for _ in range(2))
    return one == two


def _streams(server: Server) -> bool:
    chunks = list(server.chat(stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    return text == _text(server.chat()) and chunks[-1].usage.completion_tokens > 0


def _probabilities(server: Server) -> bool:
    shown = server.chat(logprobs=True, top_logprobs=3).choices[0].logprobs.content
    return all(len(each.top_logprobs) == 3 and each.logprob <= 0 for each in shown)


def _shown_canvases(server: Server) -> bool:
    chunks = server.chat(stream=True, extra={"vllm_xargs": {"dllm_stream": "denoising"}})
    return any((chunk.model_extra or {}).get("dllm_canvas") for chunk in chunks)


def _messages(server: Server) -> object:
    return server.post("/messages", {"messages": QUESTION, "max_tokens": 16})


CHAT: dict[str, Check] = {
    "`messages`, several turns": lambda s: _text(
        s.chat(messages=[*QUESTION, {"role": "assistant", "content": "88"}, *QUESTION])
    ),
    "`stream`, `stream_options.include_usage`": _streams,
    "`max_completion_tokens`": lambda s: s.chat(max_completion_tokens=2).usage.completion_tokens <= 2,
    "`n`": lambda s: len(s.chat(n=3, temperature=1).choices) == 3,
    "`stop`": lambda s: "8" not in _text(s.chat(stop=["8"])),
    "`temperature`, `top_p`": lambda s: s.chat(temperature=0.8, top_p=0.9).choices,
    "`seed`": _same_twice,
    "`presence_penalty`, `frequency_penalty`": lambda s: s.chat(presence_penalty=1, frequency_penalty=0.5).choices,
    "`logit_bias`": lambda s: s.chat(logit_bias={"5": 100, "6": -100}).choices,
    "`logprobs`, `top_logprobs`": _probabilities,
    "`response_format` `json_object`": lambda s: isinstance(
        json.loads(_text(s.chat(response_format={"type": "json_object"}, max_tokens=48))), dict
    ),
    "`response_format` `json_schema`": lambda s: _is_of_schema(
        _text(
            s.chat(
                response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}, max_tokens=48
            )
        )
    ),
    "`tools`, `tool_choice` `auto`": lambda s: s.chat(tools=[TOOL]).choices,
    "`tool_choice` `required`": _forced("required", is_strict=False),
    "`tool_choice` by name": _forced({"type": "function", "function": {"name": "add"}}, is_strict=False),
    "`tool_choice` `required`, `strict` tools": _forced("required", is_strict=True),
    "`strict` tools under `tool_choice` `auto`": lambda s: (
        s.chat(tools=[{**TOOL, "function": {**TOOL["function"], "strict": True}}]).choices
    ),
    "images, audio, files": lambda s: (
        s.chat(
            messages=[
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]}
            ]
        ).choices
    ),
}

COMPLETIONS: dict[str, Check] = {
    "`prompt` as text, as tokens, several": lambda s: (
        len(s.complete(prompt=["a", "b"]).choices) == 2 and s.complete(prompt=[5, 6]).choices
    ),
    "`echo`": lambda s: s.complete(echo=True).choices[0].text.startswith("61 + 27"),
    "`suffix`": lambda s: s.complete(prompt="6", suffix="= 88", max_tokens=5).usage.completion_tokens <= 5,
    "`logprobs`": lambda s: s.complete(logprobs=2).choices[0].logprobs.token_logprobs,
    "`best_of`": lambda s: s.complete(best_of=2, temperature=1).choices,
}

RESPONSES: dict[str, Check] = {
    "`input`, `instructions`": lambda s: s.respond(instructions="Answer.").output_text,
    "`stream`": lambda s: any(event.type == "response.completed" for event in s.respond(stream=True)),
    "`text.format` `json_schema`": lambda s: _is_of_schema(
        s.respond(
            text={"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}, max_output_tokens=48
        ).output_text
    ),
}

OTHERS: dict[str, Check] = {
    "`client.models.list()`": lambda s: s.model in [each.id for each in s.client.models.list()],
    "`/v1/messages` of Anthropic": _messages,
    "`client.embeddings.create()`": lambda s: s.client.embeddings.create(model=s.model, input="a").data,
}

EXTRAS: dict[str, Check] = {
    "`top_k`, `min_p`": lambda s: s.chat(temperature=0.8, extra={"top_k": 5, "min_p": 0.1}).choices,
    "`repetition_penalty`": lambda s: s.chat(extra={"repetition_penalty": 1.2}).choices,
    "`min_tokens`": lambda s: s.chat(extra={"min_tokens": 8}).usage.completion_tokens >= 8,
    "`allowed_token_ids`": lambda s: (
        set(
            s.complete(extra={"allowed_token_ids": [20, 21], "return_token_ids": True, "ignore_eos": True})
            .choices[0]
            .token_ids
        )
        <= {20, 21}
    ),
    "`bad_words`": lambda s: "88" not in _text(s.chat(extra={"bad_words": ["88"]})),
    "`ignore_eos`, `stop_token_ids`": lambda s: (
        s.chat(extra={"ignore_eos": True, "stop_token_ids": [10]}).usage.completion_tokens
    ),
    "`structured_outputs` `regex`": lambda s: re.fullmatch(
        "[a-c]{2}x", _text(s.chat(extra={"structured_outputs": {"regex": "[a-c]{2}x"}}))
    ),
    "`structured_outputs` `choice`": lambda s: (
        _text(s.chat(extra={"structured_outputs": {"choice": ["yes", "no"]}})) in ("yes", "no")
    ),
    "`structured_outputs` `json`": lambda s: _is_of_schema(
        _text(s.chat(extra={"structured_outputs": {"json": SCHEMA}}, max_tokens=48))
    ),
    "`structured_outputs` `grammar`": lambda s: _text(
        s.chat(extra={"structured_outputs": {"grammar": 'root ::= "a" root | "b"'}})
    ),
    "`prompt_logprobs`": lambda s: s.complete(extra={"prompt_logprobs": 1}).choices,
    "`vllm_xargs.dllm_policy` and its options": lambda s: (
        s.chat(extra={"vllm_xargs": {"dllm_policy": "threshold", "dllm_threshold": 0.8}}).choices
    ),
    "`vllm_xargs.dllm_stream`": _shown_canvases,
    "`vllm_xargs.dllm_canvas`": lambda s: re.fullmatch(
        "sum: (.|\n)*!",
        _text(s.chat(max_tokens=None, extra={"vllm_xargs": {"dllm_canvas": CANVAS}, "ignore_eos": True})),
    ),
}

TABLES = {
    "Chat": CHAT,
    "Completions": COMPLETIONS,
    "Responses": RESPONSES,
    "Other endpoints": OTHERS,
    "Fields of vLLM's own, by `extra_body`": EXTRAS,
}


def is_served(check: Check, server: Server) -> bool:
    """Try a feature; returns whether the server took the request.

    Raises: AssertionError where it did, and did not do what was asked.
    """
    try:
        assert check(server), "the reply is not what was asked for"
    except (openai.BadRequestError, openai.NotFoundError):
        return False
    return True


def lines(server: Server) -> Iterator[str]:
    """Yield the tables."""
    for title, checks in TABLES.items():
        yield from ("", f"## {title}", "", "| | works |", "|---|---|")
        for feature, check in checks.items():
            try:
                yield f"| {feature} | {'yes' if is_served(check, server) else 'no'} |"
            except Exception as error:
                error.add_note(f"while {title}: {feature} was tried")
                raise


def main() -> None:
    """Print the tables of a server."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base_url", help="for example http://localhost:8000/v1")
    client = openai.OpenAI(base_url=parser.parse_args().base_url, api_key="none", max_retries=0)
    sys.stdout.write("\n".join(lines(Server(client, client.models.list().data[0].id))) + "\n")


if __name__ == "__main__":
    main()
