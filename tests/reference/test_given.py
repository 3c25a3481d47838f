"""The reference decoders with a part of the answer given, against scalar loops that keep no keys and values."""

import random

import pytest
import torch
from torch import Tensor

from vllm_dllm.reference import block_causal, decode
from vllm_dllm.reference.constraint import Constraint
from vllm_dllm.reference.decode import KvPolicy
from vllm_dllm.reference.edits import Edits
from vllm_dllm.reference.model import LLaDA
from vllm_dllm.reference.policy import DREAM, LLADA, Rules, UnmaskPolicy, timestep_counts
from vllm_dllm.reference.qwen import Qwen
from vllm_dllm.reference.qwen import block_causal as visible_blocks
from vllm_dllm.reference.sampling import Sampling

MASK = 3
PROMPT = [7, 11, MASK, 19, 30]
NO_MASK = Sampling(forbidden_ids=(MASK,))
GIVEN = (None, 9, None, None, 8, 7, 6, 5, None, None, 21, None)  # in blocks of 4 the second one is given whole


def counts_of(rules: Rules, block_length: int, steps: int) -> list[int]:
    if rules is DREAM:
        return [count for count in timestep_counts(block_length, steps) if count]
    return [block_length // steps] * steps


def scalar_loop(
    predict: object, prompt: list[int], given: tuple[int | None, ...], block_length: int, counts: list[int], first: int
) -> tuple[list[int], int]:
    """The most confident of the masked positions of a block, as many as the schedule's first steps say."""
    x = prompt + [MASK if token is None else token for token in given]
    masked = {len(prompt) + place for place, token in enumerate(given) if token is None}
    nfe = 0
    for begin in range(first, len(x), block_length):
        for count in counts:
            left = sorted(masked & set(range(begin, begin + block_length)))
            if not left:
                break
            probs = predict(torch.tensor(x), begin, begin + block_length)  # type: ignore[operator]
            nfe += 1
            best = sorted(left, key=lambda p: (-max(probs[p]), p))[:count]
            for p in best:
                x[p] = probs[p].index(max(probs[p]))
            masked -= set(best)
    return x[len(prompt) :], nfe


def rows_of(logits: Tensor) -> list[list[float]]:
    logits[..., MASK] = -torch.inf
    rows: list[list[float]] = logits.softmax(-1).tolist()
    return rows


@pytest.mark.parametrize("steps", [4, 2])
def test_llada_sees_what_is_given_behind_a_block(model: LLaDA, steps: int) -> None:
    def predict(x: Tensor, _begin: int, _end: int) -> list[list[float]]:
        return rows_of(model(x)[0])

    policy = UnmaskPolicy(steps=3 * steps)
    found = decode.generate(
        model, torch.tensor(PROMPT), gen_length=12, block_length=4, policy=policy, sampling=NO_MASK, given=GIVEN
    )
    with torch.no_grad():
        expected = scalar_loop(predict, PROMPT, GIVEN, 4, counts_of(LLADA, 4, steps), len(PROMPT))
    assert (found.tokens.tolist(), found.nfe) == expected
    less = decode.generate(
        model, torch.tensor(PROMPT), gen_length=12, block_length=4, policy=policy, sampling=NO_MASK, given=GIVEN[:4]
    )
    assert less.tokens[:4].tolist() != found.tokens[:4].tolist(), "what is behind makes no difference"


@pytest.mark.parametrize("steps", [4, 2])
def test_dream_sees_it_through_its_shift(dream: Qwen, steps: int) -> None:
    def predict(x: Tensor, _begin: int, _end: int) -> list[list[float]]:
        logits = dream.forward(x, 0, None)[0]
        return rows_of(torch.cat([logits[:1], logits[:-1]]))

    found = decode.generate(
        dream,
        torch.tensor(PROMPT),
        gen_length=12,
        block_length=4,
        policy=UnmaskPolicy(steps=3 * steps),
        sampling=NO_MASK,
        rules=DREAM,
        given=GIVEN,
    )
    with torch.no_grad():
        expected = scalar_loop(predict, PROMPT, GIVEN, 4, counts_of(DREAM, 4, steps), len(PROMPT))
    assert (found.tokens.tolist(), found.nfe) == expected


@pytest.mark.parametrize("steps", [4, 2])
def test_sdar_sees_it_from_the_beginning_of_its_block(sdar: Qwen, steps: int) -> None:
    given = (*GIVEN[:8], 12, None, None)  # the prompt's fifth token begins the first block

    def predict(x: Tensor, _begin: int, end: int) -> list[list[float]]:
        return rows_of(sdar.forward(x[:end], 0, None, visible=visible_blocks(end, 4))[0])

    options = {"gen_length": 11, "block_length": 4, "policy": UnmaskPolicy(steps=steps), "sampling": NO_MASK}
    found = block_causal.generate(sdar, torch.tensor(PROMPT), given=given, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        expected = scalar_loop(predict, PROMPT, given, 4, counts_of(LLADA, 4, steps), 4)
    assert (found.tokens.tolist(), found.nfe) == expected
    less = block_causal.generate(sdar, torch.tensor(PROMPT), given=given[:3], **options)  # type: ignore[arg-type]
    assert less.tokens[:3].tolist() == found.tokens[:3].tolist()


def test_what_is_all_given_takes_no_forward(model: LLaDA, sdar: Qwen) -> None:
    given = tuple(range(4, 15))
    found = decode.generate(model, torch.tensor(PROMPT), gen_length=11, block_length=11, given=given)
    assert (found.tokens.tolist(), found.nfe, found.history.shape) == ([*given], 0, (0, 11))
    found = block_causal.generate(sdar, torch.tensor(PROMPT), gen_length=11, block_length=4, given=given)
    assert (found.tokens.tolist(), found.nfe, found.history.shape) == ([*given], 0, (0, 11))


@pytest.mark.parametrize("kv", [KvPolicy(), KvPolicy("dual"), KvPolicy("prefix"), KvPolicy("dual", 2)])
def test_behind_the_answer_is_context(model: LLaDA, kv: KvPolicy) -> None:
    """A suffix: its blocks are seen and not decoded."""
    options = {"gen_length": 16, "block_length": 4, "kv": kv, "sampling": NO_MASK}
    given = (*[None] * 6, 8, 9, 10, 11, 12)
    found = decode.generate(model, torch.tensor(PROMPT), given=given, answer_length=6, **options)  # type: ignore[arg-type]
    whole = decode.generate(model, torch.tensor(PROMPT), given=given, **options)  # type: ignore[arg-type]
    assert found.tokens[:11].tolist() == whole.tokens[:11].tolist()
    assert found.tokens[11:].tolist() == [MASK] * 5
    assert (found.nfe, whole.nfe) == (6, 11)


def test_penalties_count_given_tokens_from_the_beginning_of_their_block(model: LLaDA) -> None:
    """Logits of the first step alone say so: a token that is given in the block is not taken there, one behind is."""
    bias = tuple((token, 100.0) for token in (9,))
    sampling = Sampling(forbidden_ids=(MASK,), edits=Edits(bias=bias, presence=200.0))
    options = {"gen_length": 8, "block_length": 4, "policy": UnmaskPolicy(steps=2), "sampling": sampling}
    behind = decode.generate(model, torch.tensor(PROMPT), given=(*[None] * 4, 9), **options)  # type: ignore[arg-type]
    within = decode.generate(model, torch.tensor(PROMPT), given=(None, 9), **options)  # type: ignore[arg-type]
    assert 9 in behind.tokens[:4].tolist()
    assert within.tokens[:4].tolist().count(9) == 1


def test_an_answer_is_completable_with_what_is_given_behind_a_block(model: LLaDA, sdar: Qwen) -> None:
    """Of a's and then b's, as far as the answer goes: a given a forbids a b before it, whatever the block."""
    a, b, end = 10, 11, 1
    constraint = Constraint([{a: 0, b: 1}, {b: 1}], frozenset({1}), (end,), 12)
    rng = random.Random(0)
    for _ in range(6):
        bias = ((a, 100.0), (b, rng.choice([99.0, 101.0])))
        given = [None] * 12
        given[rng.choice([5, 7])] = a  # type: ignore[call-overload]
        sampling = Sampling(forbidden_ids=(MASK,), edits=Edits(bias=bias), seed=rng.randrange(99), temperature=0.9)
        options = {"gen_length": 12, "block_length": 4, "sampling": sampling, "constraint": constraint}
        for found in (
            decode.generate(model, torch.tensor(PROMPT[:4]), given=given, **options),  # type: ignore[arg-type]
            block_causal.generate(sdar, torch.tensor(PROMPT[:4]), given=given, **options),  # type: ignore[arg-type]
        ):
            tokens = found.tokens.tolist()
            assert all(one in (None, token) for one, token in zip(given, tokens, strict=True))
            text = "".join({a: "a", b: "b", end: "."}[token] for token in tokens)
            assert text.startswith("a" * (given.index(a) + 1))
            assert "ba" not in text
            assert "b" in text
