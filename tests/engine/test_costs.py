"""What a front end does for one request is bounded by `max_model_len` and documented limits, before it is done."""

import asyncio
import re
import threading
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm import SamplingParams

from tests.engine import test_structured
from vllm_dllm.engine import scoring
from vllm_dllm.engine.pins import SENT, put_pins_in
from vllm_dllm.engine.refusals import RequestError
from vllm_dllm.engine.scoring import Question, Scoring
from vllm_dllm.likelihood import Part, draw_masks, parts
from vllm_dllm.state.pins import OPEN

LONGEST, MASK, BLOCK = 64, 3, 8


class Tokenizer:
    """A token for each letter; it keeps what it was given."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def encode(self, text: str, **_: Any) -> list[int]:
        self.seen.append(text)
        return [ord(letter) for letter in text]

    @property
    def added_tokens_decoder(self) -> dict[int, str]:
        return {MASK: "<|m|>"}


def processor() -> Any:
    own = test_structured.processor()
    own.tokenizer = Tokenizer()
    return own


@pytest.mark.parametrize(
    ("given", "max_tokens", "message"),
    [
        (
            {"dllm_suffix": [5]},
            2**62,
            f"max_tokens is {2**62} before a suffix, which lies behind so many tokens; ",
        ),
        (
            {"dllm_suffix": "a"},
            65,
            "max_tokens is 65 before a suffix, which lies behind so many tokens; allowed",
        ),
        ({"dllm_suffix": [5] * 65}, 1, "suffix has 65 tokens, allowed are 64 at most (max_model_len 64); shorten it"),
        ({"dllm_suffix": "a" * 4097}, 1, "suffix has 4097 characters, allowed are 4096 at most (64 for each of max_mo"),
        ({"dllm_canvas": [None] * 65}, 1, "dllm_canvas has 65 tokens, allowed are 64 at most"),
        ({"dllm_canvas": "<|m|>" * 1000}, 1, "dllm_canvas has 5000 characters, allowed are 4096 at most"),
    ],
)
def test_what_cannot_fit_is_refused_before_anything_is_made(
    given: dict[str, Any], max_tokens: int, message: str
) -> None:
    own = processor()
    with pytest.raises(RequestError, match="^" + re.escape(message)):
        put_pins_in(own, SamplingParams(max_tokens=max_tokens, extra_args=given), follows=True)
    assert own.tokenizer.seen == []


def test_what_fits_is_taken() -> None:
    for given, sent in (
        ({"dllm_suffix": [5] * 4}, [OPEN] * 60 + [5] * 4),
        ({"dllm_canvas": "<|m*63|>a"}, [OPEN] * 63 + [97]),
    ):
        params = SamplingParams(max_tokens=60, extra_args=given)
        put_pins_in(processor(), params, follows=True)
        assert params.extra_args == {SENT: sent}


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (Question("a" * 4097, ["b"]), "context has 4097 characters, allowed are 4096 at most"),
        (Question("a", ["b", "c" * 4097]), "continuations[1] has 4097 characters, allowed are 4096 at most"),
        (Question([5] * 65, [[5]]), "context has 65 tokens, allowed are 64 at most"),
        (Question([5], [[5] * 65]), "continuations[0] has 65 tokens, allowed are 64 at most"),
        (Question([5], [[5] * 9] * 128, 1024), "samples is 1024 of continuations that have at least 1152 tokens toget"),
        (Question("a", ["b" * 640] * 128, 1024), "samples is 1024 of continuations that have at least 1280 tokens"),
    ],
)
def test_a_question_is_bounded_before_it_is_tokenized(question: Question, message: str) -> None:
    own = processor()
    with pytest.raises(RequestError, match="^" + re.escape(message)):
        Scoring(question, own.vllm_config, own.tokenizer)
    assert own.tokenizer.seen == []


def test_the_tokens_of_texts_are_bounded_too() -> None:
    own = processor()
    texts = ["b" * 9] * 128  # at least 0 tokens by their characters
    with pytest.raises(RequestError, match="lower samples to at most 910, or ask for the continuations in several"):
        Scoring(Question("a", texts, 911), own.vllm_config, own.tokenizer)
    assert Scoring(Question("a", texts, 910), own.vllm_config, own.tokenizer).samples == 910


class Engine:
    """It answers requests in another order than they come, each by what it is asked alone."""

    def __init__(self) -> None:
        self.order = np.random.default_rng(0)

    async def generate(self, prompt: Any, params: SamplingParams, _: str) -> AsyncIterator[Any]:
        assert params.extra_args is not None
        asked = params.extra_args[scoring.SENT]
        for _ in range(self.order.integers(1, 40)):
            await asyncio.sleep(0)
        log_probs = log_probs_of(prompt["prompt_token_ids"], asked.behind, len(asked.tokens))
        found = [{token: SimpleNamespace(logprob=x)} for token, x in zip(asked.tokens, log_probs, strict=True)]
        yield SimpleNamespace(outputs=[SimpleNamespace(token_ids=asked.tokens, logprobs=found)])


def log_probs_of(prompt: list[int], behind: list[int], length: int) -> list[float]:
    seen = np.random.default_rng([token + 1 for token in [*prompt, *behind]])
    return (-seen.random(length)).tolist()


def estimate_of(pair: tuple[list[int], list[int]], samples: int, seed: int) -> tuple[float, float, list[float]]:
    """All samples at once: the mean, its error, and the part of each position."""
    masks = draw_masks(samples, len(pair[1]), seed)
    log_probs = np.zeros(masks.shape)
    for part in parts(*pair, masks, BLOCK, MASK):
        part.put(log_probs[part.sample], log_probs_of(part.prompt, part.behind, len(part.targets)))
    weighted = np.where(masks, log_probs, 0.0) * (masks.shape[1] / masks.sum(1, keepdims=True))
    values = weighted.sum(1)
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(samples)), weighted.mean(0).tolist()


def test_estimates_do_not_depend_on_the_order_and_the_event_loop_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    own, drawn = processor(), []

    def draw(samples: int, length: int, seed: int) -> Any:
        assert threading.current_thread() is not threading.main_thread()
        drawn.append(length)
        return draw_masks(samples, length, seed)

    async def ask() -> Any:
        question = Question("ab  ", ["c" * 20, "de"], 40, 7)
        asked = await scoring.in_thread(lambda: Scoring(question, own.vllm_config, own.tokenizer))
        assert drawn == []
        found: Any = await scoring.answer(Engine(), asked)  # type: ignore[arg-type]  # as far as it is asked
        assert asked._rows == {}
        return asked.pairs, [(each.value, each.standard_error, each.tokens) for each in found]

    monkeypatch.setattr(scoring, "draw_masks", draw)
    pairs, found = asyncio.run(ask())
    assert own.tokenizer.seen == ["ab", "ab  " + "c" * 20, "ab  de"]
    assert drawn == [22, 4]
    assert found == [estimate_of(pair, 40, 7) for pair in pairs]


def test_masks_are_drawn_when_their_continuation_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    own, drawn = processor(), []
    monkeypatch.setattr(scoring, "draw_masks", lambda *shape: drawn.append(shape) or draw_masks(*shape))
    requests = Scoring(Question([5], [[6, 7], [8]], 3), own.vllm_config, None).requests()
    i, part, _ = next(requests)
    assert (i, isinstance(part, Part), drawn) == (0, True, [(3, 2, 0)])
    assert [i for i, *_ in requests] == [0, 0, 1, 1, 1]
    assert drawn == [(3, 2, 0), (3, 1, 0)]
