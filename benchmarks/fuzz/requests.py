"""Generated requests: every policy, any length, temperatures, edits of the logits, with and without a constraint."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.fuzz.asked import Asked
from vllm_dllm.policy_options import options_of
from vllm_dllm.unmask.registry import BUILT_IN, NATIVE, changes_tokens, parameters

POLICIES = (*NATIVE, *(name for name in BUILT_IN if name != "indel"))  # which needs tokens of its model


@dataclass(frozen=True)
class Shape:
    """What requests have to fit.

    Attributes:
        vocab_size: of the model; ids below 4 are its special tokens.
        prompt_ids: what drawn prompts have. No parts of characters: vLLM begins the text of a reply with its prompt's
            where that ends within one.
        block_length: of the server.
        max_tokens: of a reply at most; a prompt may have as many.
    """

    vocab_size: int
    prompt_ids: Sequence[int]
    block_length: int
    max_tokens: int = 96


@dataclass(frozen=True)
class Drawn:
    """A request.

    Attributes:
        prompt: token ids.
        sampling: fields of `SamplingParams`, which are those of a body of `/v1/completions`, too.
        options: `dllm_*` options, and their values.
        asked: what the answer has to meet, if anything.
    """

    prompt: list[int]
    sampling: dict[str, Any]
    options: dict[str, Any]
    asked: Asked | None


def whole_ids(tokenizer: Any) -> list[int]:
    """Return the tokens that are whole characters by themselves, behind the small models' special ones."""
    return [token for token in range(4, len(tokenizer)) if "\ufffd" not in tokenizer.decode([token])]


def needed_tokens(refusal: str) -> int | None:
    """Return how many tokens an answer needs, as the refusal of a request with fewer says; None: it says nothing."""
    needed = re.search(r"allowed are (\d+) and more; raise max_tokens", refusal)
    return needed and int(needed[1])


def draw_request(rng: random.Random, shape: Shape, asked: Asked | None, prompts: Sequence[list[int]]) -> Drawn:
    """Draw a request; some have one of the given prompts, others any token ids."""
    max_tokens = rng.choice([1, 3, shape.block_length, shape.block_length + 1, 24, 40, shape.max_tokens])
    length = rng.choice([1, 2, 5, shape.block_length, 21, rng.randint(1, shape.max_tokens)])
    prompt = rng.choices(shape.prompt_ids, k=length)
    if prompts and rng.random() < 0.5:
        prompt = rng.choice(prompts)
    # Where tokens are taken back, no constraint holds.
    policy = rng.choice([each for each in POLICIES if asked is None or not changes_tokens(each)])
    sampling = {"max_tokens": max_tokens, **_sampling(rng, policy)}
    sampling |= _edits(rng, shape.vocab_size, policy)
    if rng.random() < 0.1:
        sampling["logprobs"] = rng.choice([0, 1, 5])
    if asked is None:
        sampling |= _of_free_ones(rng, shape.vocab_size, max_tokens, policy)
    options = _options(rng, policy, shape.block_length, max_tokens)
    if asked is None and rng.random() < 0.05:
        options["dllm_logits_eos_inf"] = True
    if asked is None and rng.random() < 0.05:
        options["dllm_horizon"] = rng.choice([1, 2, 3])
    if asked is None and rng.random() < 0.15 and "bad_words" not in sampling and not changes_tokens(policy):
        pinned = rng.choice([0.1, 0.5, 0.9])
        options["dllm_canvas"] = [
            rng.choice(shape.prompt_ids) if rng.random() < pinned else _HOLE for _ in range(max_tokens)
        ]
    return Drawn(prompt, sampling, options, asked)


def check_pins(options: dict[str, Any], token_ids: Sequence[int]) -> None:
    """Check that an answer has the tokens that were given of it, as far as it goes. Raises: ValueError."""
    for place, (given, token) in enumerate(zip(options.get("dllm_canvas", ()), token_ids, strict=False)):
        if given not in (_HOLE, token):
            raise ValueError(f"token {place} is {token}, but {given} was given")


def _sampling(rng: random.Random, policy: str) -> dict[str, Any]:
    temperature = 0.0 if changes_tokens(policy) else rng.choice([0.0, 0.0, 0.3, 1.0, 1.5])
    sampling = {"temperature": temperature, "seed": rng.randrange(1 << 62), "ignore_eos": rng.random() < 0.3}
    if policy != "credit" or not temperature:
        sampling |= {"top_k": rng.choice([0, 0, 1, 7]), "top_p": rng.choice([1.0, 1.0, 0.8, 0.2])}
        sampling["min_p"] = rng.choice([0.0, 0.0, 0.1])
    return sampling


def _edits(rng: random.Random, vocab_size: int, policy: str) -> dict[str, Any]:
    if rng.random() < 0.6:
        return {}
    ids = rng.sample(range(1, vocab_size), 4)
    edits = {
        "presence_penalty": rng.choice([-1.0, 0.5, 2.0]),
        "frequency_penalty": rng.choice([-0.5, 0.7]),
        "repetition_penalty": rng.choice([0.5, 1.3, 4.0]),
        "logit_bias": {token: rng.choice([-100.0, -5.0, 4.0, 100.0]) for token in ids if token != _MASK_ID},
    }
    return {name: value for name, value in edits.items() if rng.random() < 0.5}


_HOLE = -1
"""Of a canvas: a token to be generated."""

_MASK_ID = 3
"""Of the small models: no answer has it, and nobody may ask for it."""


def _of_free_ones(rng: random.Random, vocab_size: int, max_tokens: int, policy: str) -> dict[str, Any]:
    """What is refused beside a constraint, since it forbids tokens, too, or would cut the answer."""
    ids = rng.sample(range(4, vocab_size), 30)
    more = {
        "allowed_token_ids": [1, *ids],
        "min_tokens": rng.randint(1, max_tokens),
        "stop": [rng.choice(["a", "1", "e "])],
        "stop_token_ids": ids[:3],
    }
    if not changes_tokens(policy):
        more["bad_words"] = rng.sample(["a", "1", "ab", " e", "0 1"], 2)
    return {name: value for name, value in more.items() if rng.random() < 0.15}


def _options(rng: random.Random, policy: str, block_length: int, max_tokens: int) -> dict[str, Any]:
    num_blocks = -(-max_tokens // block_length)
    per_block = rng.choice([n for n in range(1, block_length + 1) if block_length % n == 0])
    values: dict[str, Any] = {
        "threshold": rng.choice([0.05, 0.3, 0.9, 1.0]),
        "factor": rng.choice([0.3, 1.0, 1.9]),
        "entropy_bound": rng.choice([0.35, 5.0]),
        "alg_temp": rng.choice([0.0, 0.3]),
        "credit_alpha": rng.choice([0.7, 5.0]),
        "credit_beta": rng.choice([0.0, 0.8]),
        "credit_gamma": rng.choice([0.2, 1.0]),
        "steps": num_blocks * per_block,
    }
    for name, parameter in parameters().items():
        values[name] = rng.choice([parameter.default, parameter.low, min(parameter.high, 2 * parameter.default)])
    given = [name for name in options_of(policy) if rng.random() < 0.6]
    options = {f"dllm_{name}": values[name] for name in given} | {"dllm_policy": policy}
    if rng.random() < 0.1:
        options["dllm_budget"] = rng.choice([0, 1, 3])
    return options
