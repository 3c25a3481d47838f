"""Likelihoods of continuations by an engine: requests whose blocks are scored, which take a step each.

A sample's forward is the first step of a request: a refresh of the whole sequence, as any block of a bidirectional
model begins with. What the block's masked positions say of the given tokens comes back as log-probabilities.
"""

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.utils import random_uuid

from vllm_dllm.engine.configs import settings_of
from vllm_dllm.engine.refusals import RequestError, not_allowed
from vllm_dllm.engine.targets import SENT, Targets
from vllm_dllm.likelihood import Estimate, Part, draw_masks, estimate, parts

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.config import VllmConfig
    from vllm.v1.engine.async_llm import AsyncLLM

MAX_SAMPLES, MAX_CONTINUATIONS = 1024, 128
NUM_AT_ONCE = 16
"""Requests of one call that are in the engine together: others find their turn between them."""

_KV_POLICIES = ("dual", "prefix")

Tokens = list[int]


@dataclass(frozen=True, slots=True)
class Question:
    """How likely some continuations are behind a context, each as text or as token ids."""

    context: str | Tokens
    continuations: Sequence[str | Tokens]
    samples: int = 128
    seed: int = 0


class Scoring:
    """What an engine is asked for a question, and what its answers come to.

    Args:
        question: of a client.
        vllm_config, tokenizer: of the engine.

    Raises: RequestError.
    """

    def __init__(self, question: Question, vllm_config: "VllmConfig", tokenizer: Any) -> None:
        _check(question, vllm_config)
        pairs = [_encoded(question.context, each, tokenizer, i) for i, each in enumerate(question.continuations)]
        self._settings, model_config = settings_of(vllm_config), vllm_config.model_config
        self._mask_token_id: int = model_config.hf_config.mask_token_id
        for i, pair in enumerate(pairs):
            _check_pair(*pair, i, self._settings.block_length, vllm_config)
        self.pairs = pairs
        self._is_masked = [draw_masks(question.samples, len(behind), question.seed) for _, behind in pairs]
        self._log_probs = [np.zeros(masks.shape) for masks in self._is_masked]

    def requests(self) -> Iterator[tuple[int, Part, SamplingParams]]:
        """Yield what is asked, each with the number of its continuation."""
        for i, (pair, masks) in enumerate(zip(self.pairs, self._is_masked, strict=True)):
            for part in parts(*pair, masks, self._settings.block_length, self._mask_token_id):
                yield i, part, _params(part)

    def take(self, i: int, part: Part, output: Any) -> None:
        """Take the engine's answer."""
        (its,) = output.outputs
        assert list(its.token_ids) == part.targets, "a block that is scored takes its targets"
        found = [place[token].logprob for token, place in zip(its.token_ids, its.logprobs, strict=True)]
        part.put(self._log_probs[i], found)

    def estimates(self) -> list[Estimate]:
        """Return what all answers come to, by continuation."""
        return [estimate(*each) for each in zip(self._log_probs, self._is_masked, strict=True)]


def loglikelihood(llm: "LLM", question: Question) -> list[Estimate]:
    """Estimate how likely continuations are, by an offline engine. Raises: RequestError."""
    scoring = Scoring(question, llm.llm_engine.vllm_config, llm.llm_engine.get_tokenizer())
    asked = list(scoring.requests())
    prompts = [{"prompt_token_ids": part.prompt} for _, part, _ in asked]
    outputs = llm.generate(prompts, [params for *_, params in asked], use_tqdm=False)
    for (i, part, _), output in zip(asked, outputs, strict=True):
        scoring.take(i, part, output)
    return scoring.estimates()


async def answer(engine: "AsyncLLM", scoring: Scoring) -> list[Estimate]:
    """Have a server's engine answer; whoever cancels this ends its requests."""
    asked = scoring.requests()

    async def ask_on() -> None:
        for i, part, params in asked:  # one iterator, from which each of the tasks takes the next one
            async for output in engine.generate({"prompt_token_ids": part.prompt}, params, f"score-{random_uuid()}"):
                scoring.take(i, part, output)

    tasks = [asyncio.create_task(ask_on()) for _ in range(NUM_AT_ONCE)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
    return scoring.estimates()


def _params(part: Part) -> SamplingParams:
    return SamplingParams(
        max_tokens=len(part.targets),
        temperature=0.0,
        logprobs=0,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args={SENT: Targets(part.behind, part.targets)},
    )


def _check(question: Question, vllm_config: "VllmConfig") -> None:
    """Check what does not depend on tokens. Raises: RequestError."""
    settings = settings_of(vllm_config)
    if settings.is_block_causal or settings.has_windows:
        raise RequestError(
            f"the model is {vllm_config.model_config.architecture}, in which a block sees what is before it alone, so "
            "that the published estimate has no meaning for it; allowed are bidirectional models (LLaDA, Dream, "
            "LLaDA-MoE); serve one, or Nemotron in mode 'ar', which has vLLM's prompt_logprobs",
            parameter="model",
        )
    if settings.kv_policy not in _KV_POLICIES:
        raise RequestError(
            f"the server's kv_policy is {settings.kv_policy!r}; likelihoods are served with "
            f"{' and '.join(map(repr, _KV_POLICIES))}; start it with one of these",
            parameter="model",
        )
    if not 1 <= question.samples <= MAX_SAMPLES:
        raise not_allowed("samples", question.samples, f"whole numbers from 1 to {MAX_SAMPLES}")
    if not 1 <= len(question.continuations) <= MAX_CONTINUATIONS:
        raise not_allowed(
            "continuations", question.continuations, f"lists of 1 to {MAX_CONTINUATIONS} texts or lists of token ids"
        )
    if not -(2**63) <= question.seed < 2**63:
        raise not_allowed("seed", question.seed, "64-bit signed integers")


def _encoded(context: str | Tokens, continuation: str | Tokens, tokenizer: Any, i: int) -> tuple[Tokens, Tokens]:
    """Return the token ids of both, of text as LLaDA's evaluation has it: spaces between belong to the continuation."""
    if not isinstance(context, str) and not isinstance(continuation, str):
        return list(context), list(continuation)
    if not isinstance(context, str) or not isinstance(continuation, str):
        raise RequestError(
            f"continuations[{i}] is {continuation!r:.80}, but context is {context!r:.80}; allowed are texts for both "
            "and lists of token ids for both; send one of these",
            parameter="continuations",
        )
    if tokenizer is None:
        raise RequestError(
            "context is text, but the server has no tokenizer (--skip-tokenizer-init); allowed are token ids; send "
            "them",
            parameter="context",
        )
    own = tokenizer.encode(context.rstrip(" "))
    return own, tokenizer.encode(context + continuation)[len(own) :]


def _check_pair(context: Tokens, continuation: Tokens, i: int, block_length: int, vllm_config: "VllmConfig") -> None:
    """Check token ids and lengths. Raises: RequestError."""
    config, longest = vllm_config.model_config.hf_config, vllm_config.model_config.max_model_len
    size = vllm_config.model_config.get_vocab_size()
    for name, tokens in (("context", context), (f"continuations[{i}]", continuation)):
        if not tokens:
            raise RequestError(f"{name} has no tokens, allowed is one and more; send some", parameter=name)
        wrong = next((each for each in tokens if not 0 <= each < size or each == config.mask_token_id), None)
        if wrong is not None:
            raise RequestError(
                f"{name} has the token {wrong}, allowed are ids from 0 to {size - 1} but the mask token "
                f"{config.mask_token_id}; correct it",
                parameter=name,
                value=wrong,
            )
    needed = len(context) + -(-len(continuation) // block_length) * block_length
    if needed > longest:
        raise RequestError(
            f"context and continuations[{i}] have {len(context)} and {len(continuation)} tokens, which take {needed} "
            f"positions in blocks of {block_length}; allowed are {longest} (max_model_len); shorten the context",
            parameter="context",
            value=needed,
        )
