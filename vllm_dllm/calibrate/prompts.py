"""Prompts to calibrate with: a JSON object per line."""

import hashlib
import json
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from vllm_dllm.errors import ConfigError, nearest

Message = dict[str, str]
"""`role` and `content`, as chat templates read them."""

TEXT_FIELDS = ("text", "prompt", "question")
_ALLOWED = f"{', '.join(TEXT_FIELDS)} (one text each, the user's message) and messages (a conversation)"


class Tokenizer(Protocol):
    """What is used of a tokenizer of transformers."""

    chat_template: object
    encode: Callable[..., list[int]]
    apply_chat_template: Callable[..., str]


@dataclass(frozen=True, slots=True)
class Prompts:
    """The prompts of a file, as conversations, and what the file is known by."""

    path: Path
    sha256: str  # of the whole file
    conversations: tuple[tuple[Message, ...], ...]


def read_prompts(path: Path, num_samples: int) -> Prompts:
    """Read the first prompts of a file.

    Args:
        path: JSON lines, each with one of the fields text, prompt, question and messages; others are left alone.
        num_samples: how many; a shorter file is read whole.

    Raises: ConfigError naming the file, the line and the field, what was given, what is allowed and what to do.
    """
    try:
        content = path.read_bytes()
        lines = content.decode().splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"prompts file {path} cannot be read ({error}); give a file of JSON lines") from None
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()][:num_samples]
    if not numbered:
        raise ConfigError(f"prompts file {path} has no lines; give a file of JSON lines with one of {_ALLOWED}")
    conversations = tuple(_conversation(line, f"{path}, line {number}") for number, line in numbered)
    return Prompts(path, hashlib.sha256(content).hexdigest(), conversations)


def encode(tokenizer: Tokenizer, conversation: Sequence[Message]) -> list[int]:
    """Return the token ids of a conversation in the chat template, or of its texts together where there is none.

    Args:
        tokenizer: of the model.
        conversation: its messages.
    """
    if tokenizer.chat_template is None:
        return tokenizer.encode("\n".join(message["content"] for message in conversation))
    text = tokenizer.apply_chat_template(list(conversation), tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)


def _conversation(line: str, where: str) -> tuple[Message, ...]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not JSON ({error}); give one JSON object per line") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{where} is {reprlib.repr(value)}; allowed are JSON objects with one of {_ALLOWED}")
    given = [field for field in (*TEXT_FIELDS, "messages") if field in value]
    if len(given) != 1:
        found = " and ".join(given) or "none of them"
        fields = (*TEXT_FIELDS, "messages")
        meant = next(filter(None, (nearest(field, fields) for field in value)), None) if not given else None
        todo = f"did you mean {meant!r}?" if meant else "keep one field"
        raise ConfigError(f"{where} has {found}; allowed is exactly one of {_ALLOWED}; {todo}")
    field = given[0]
    if field == "messages":
        return _messages(value[field], where)
    if not isinstance(value[field], str) or not value[field].strip():
        shown = reprlib.repr(value[field])
        raise ConfigError(f"{where}: {field} is {shown}; allowed are texts with at least one character; correct it")
    return ({"role": "user", "content": value[field]},)


def _messages(value: object, where: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{where}: messages is {reprlib.repr(value)}; allowed are lists of at least one message")
    for index, message in enumerate(value):
        is_message = isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        if not is_message:
            raise ConfigError(
                f"{where}: messages[{index}] is {reprlib.repr(message)}; allowed are objects whose role and "
                "content are texts; correct it"
            )
    return tuple({"role": message["role"], "content": message["content"]} for message in value)
