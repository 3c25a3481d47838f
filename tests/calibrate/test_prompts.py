"""Prompt files: what is read, and what is refused."""

import hashlib
import json

import pytest

from vllm_dllm.calibrate.prompts import encode, read_prompts
from vllm_dllm.errors import ConfigError


def write(tmp_path, *lines):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def test_every_form(tmp_path):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    path = write(
        tmp_path,
        {"question": "1 + 1?", "answer": "2"},
        {"text": "Write a sort.", "code": "..."},
        "",
        {"prompt": "def f():"},
        {"messages": chat},
    )
    prompts = read_prompts(path, 50)
    user = [[{"role": "user", "content": text}] for text in ("1 + 1?", "Write a sort.", "def f():")]
    assert [list(conversation) for conversation in prompts.conversations] == [*user, chat]
    assert prompts.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_only_the_first_samples_are_read(tmp_path):
    path = write(tmp_path, {"text": "one"}, {"text": "two"}, "not JSON")
    assert len(read_prompts(path, 2).conversations) == 2


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("{", "line 2 is not JSON"),
        ("3", "line 2 is 3; allowed are JSON objects"),
        ({"query": "?"}, "line 2 has none of them; allowed is exactly one of text, prompt, question"),
        ({"text": "a", "prompt": "b"}, "line 2 has text and prompt; allowed is exactly one"),
        ({"question": 5}, "line 2: question is 5; allowed are texts"),
        ({"text": " "}, "line 2: text is ' '; allowed are texts"),
        ({"messages": []}, "line 2: messages is []; allowed are lists"),
        ({"messages": [{"role": "user"}]}, "line 2: messages[0] is {'role': 'user'}; allowed are objects"),
        ({"messages": [{"role": "user", "content": "a"}, "b"]}, "line 2: messages[1] is 'b'; allowed are objects"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, text):
    path = write(tmp_path, {"text": "fine"}, line)
    with pytest.raises(ConfigError) as error:
        read_prompts(path, 50)
    assert text in str(error.value)
    assert str(path) in str(error.value)


class FakeTokenizer:
    """Begins what it encodes with 1, unless it is told not to."""

    def __init__(self, chat_template):
        self.chat_template = chat_template

    def apply_chat_template(self, messages, *, tokenize, add_generation_prompt):
        assert (tokenize, add_generation_prompt) == (False, True)
        return "".join(f"[{message['role']}]{message['content']}" for message in messages)

    def encode(self, text, add_special_tokens=True):
        return [1] * add_special_tokens + list(text.encode())


def test_conversations_are_put_into_the_template_where_there_is_one():
    chat = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    assert encode(FakeTokenizer("a template"), chat) == list(b"[user]a[assistant]b")
    assert encode(FakeTokenizer(None), chat) == [1, *b"a\nb"]


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"prompts file .*missing\.jsonl cannot be read"):
        read_prompts(tmp_path / "missing.jsonl", 50)
    with pytest.raises(ConfigError, match="has no lines"):
        read_prompts(write(tmp_path, ""), 50)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_prompts(tmp_path / "bytes", 50)
