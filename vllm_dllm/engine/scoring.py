"""Likelihoods of continuations by an engine: requests whose blocks are scored, which take a step each.

A sample's forward is the first step of a request: a refresh of the whole sequence, as any block of a bidirectional
model begins with. What the block's masked positions say of the given tokens comes back as log-probabilities.
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.utils import random_uuid

from vllm_dllm.engine.configs import settings_of
from vllm_dllm.engine.refusals import CHARACTERS_PER_TOKEN, RequestError, check_length, not_allowed
from vllm_dllm.engine.targets import SENT, Targets
from vllm_dllm.likelihood import Estimate, Mean, Part, draw_masks, parts

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.config import VllmConfig
    from vllm.v1.engine.async_llm import AsyncLLM

MAX_SAMPLES, MAX_CONTINUATIONS = 1024, 128
MAX_DRAWN = 2**20
"""Samples times tokens of all continuations of a call: for each it is drawn whether it is masked."""
NUM_AT_ONCE = 16
"""Requests of one call that are in the engine together: others find their turn between them."""

_worker = ThreadPoolExecutor(1, "dllm-scoring")
"""Where texts are tokenized, masks drawn and requests made: other requests go on beside it, other calls wait."""

_KV_POLICIES = ("dual", "prefix")

Tokens = list[int]
_T = TypeVar("_T")


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
        self._settings, model_config = settings_of(vllm_config), vllm_config.model_config
        self._mask_token_id: int = model_config.hf_config.mask_token_id
        self.samples, self._seed = question.samples, question.seed
        self.pairs = _pairs(question, tokenizer, vllm_config)
        self._means = [Mean(question.samples, len(behind)) for _, behind in self.pairs]
        self._rows: dict[tuple[int, int], _Row] = {}  # of samples under way

    def requests(self) -> Iterator[tuple[int, Part, SamplingParams]]:
        """Yield what is asked, each with the number of its continuation."""
        for i, (context, behind) in enumerate(self.pairs):
            masks = draw_masks(self.samples, len(behind), self._seed)
            for part in parts(context, behind, masks, self._settings.block_length, self._mask_token_id):
                key, masked = (i, part.sample), masks[part.sample]
                if key not in self._rows:
                    self._rows[key] = _Row(np.zeros(len(behind)), masked, masked.copy())
                yield i, part, _params(part)

    def take(self, i: int, part: Part, output: Any) -> None:
        """Take the engine's answer."""
        (its,) = output.outputs
        assert list(its.token_ids) == part.targets, "a block that is scored takes its targets"
        found = [place[token].logprob for token, place in zip(its.token_ids, its.logprobs, strict=True)]
        row = self._rows[i, part.sample]
        part.put(row.log_probs, found)
        row.is_missing[part.begin : part.begin + len(found)] = False
        if not row.is_missing.any():
            del self._rows[i, part.sample]
            self._means[i].add(part.sample, row.log_probs, row.is_masked)

    def estimates(self) -> list[Estimate]:
        """Return what all answers come to, by continuation."""
        return [mean.estimate() for mean in self._means]


@dataclass(frozen=True, slots=True)
class _Row:
    """A sample under way; [length] each."""

    log_probs: NDArray[np.float64]
    is_masked: NDArray[np.bool_]
    is_missing: NDArray[np.bool_]  # masked, and not answered yet


def loglikelihood(llm: "LLM", question: Question) -> list[Estimate]:
    """Estimate how likely continuations are, by an offline engine. Raises: RequestError."""
    scoring = Scoring(question, llm.llm_engine.vllm_config, llm.llm_engine.get_tokenizer())
    asked = list(scoring.requests())
    prompts = [{"prompt_token_ids": part.prompt} for _, part, _ in asked]
    outputs = llm.generate(prompts, [params for *_, params in asked], use_tqdm=False)
    for (i, part, _), output in zip(asked, outputs, strict=True):
        scoring.take(i, part, output)
    return scoring.estimates()


async def in_thread(work: Callable[[], _T]) -> _T:
    """Do what may take long beside the event loop, one after another."""
    return await asyncio.get_running_loop().run_in_executor(_worker, work)


async def answer(engine: "AsyncLLM", scoring: Scoring) -> list[Estimate]:
    """Have a server's engine answer; whoever cancels this ends its requests."""
    asked = scoring.requests()

    async def ask_on() -> None:
        # One iterator, from which each of the tasks takes the next one.
        while (request := await in_thread(lambda: next(asked, None))) is not None:
            i, part, params = request
            async for output in engine.generate({"prompt_token_ids": part.prompt}, params, f"score-{random_uuid()}"):
                scoring.take(i, part, output)

    tasks = [asyncio.create_task(ask_on()) for _ in range(NUM_AT_ONCE)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
    return await in_thread(scoring.estimates)


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


def _pairs(question: Question, tokenizer: Any, vllm_config: "VllmConfig") -> list[tuple[Tokens, Tokens]]:
    """Return the token ids of the context and of each continuation. Raises: RequestError."""
    longest, block_length = vllm_config.model_config.max_model_len, settings_of(vllm_config).block_length
    check_length("context", question.context, longest)
    for i, each in enumerate(question.continuations):
        check_length(f"continuations[{i}]", each, longest)
        _check_kind(question.context, each, i, tokenizer)
    per_token = CHARACTERS_PER_TOKEN if isinstance(question.context, str) else 1
    _check_drawn(question.samples, sum(len(each) // per_token for each in question.continuations))
    given = question.context
    context: Tokens = tokenizer.encode(given.rstrip(" ")) if isinstance(given, str) else list(given)
    _check_tokens("context", context, vllm_config)
    pairs = []
    for i, each in enumerate(question.continuations):
        # As LLaDA's evaluation has it: spaces between belong to the continuation.
        ids = tokenizer.encode(f"{given}{each}")[len(context) :] if isinstance(each, str) else list(each)
        _check_tokens(f"continuations[{i}]", ids, vllm_config)
        _check_room(context, ids, i, block_length, longest)
        pairs.append((context, ids))
    _check_drawn(question.samples, sum(len(ids) for _, ids in pairs))
    return pairs


def _check_kind(context: str | Tokens, continuation: str | Tokens, i: int, tokenizer: Any) -> None:
    """Check that both are text, and may be, or both are token ids. Raises: RequestError."""
    if isinstance(context, str) != isinstance(continuation, str):
        raise RequestError(
            f"continuations[{i}] is {continuation!r:.80}, but context is {context!r:.80}; allowed are texts for both "
            "and lists of token ids for both; send one of these",
            parameter="continuations",
        )
    if isinstance(context, str) and tokenizer is None:
        raise RequestError(
            "context is text, but the server has no tokenizer (--skip-tokenizer-init); allowed are token ids; send "
            "them",
            parameter="context",
        )


def _check_drawn(samples: int, num_tokens: int) -> None:
    """Check how much is drawn. Raises: RequestError."""
    if samples * num_tokens > MAX_DRAWN:
        raise RequestError(
            f"samples is {samples} of continuations that have at least {num_tokens} tokens together, allowed are "
            f"{MAX_DRAWN} samples times tokens; lower samples to at most {MAX_DRAWN // num_tokens}, or ask for the "
            "continuations in several requests",
            parameter="samples",
            value=samples,
        )


def _check_tokens(name: str, tokens: Tokens, vllm_config: "VllmConfig") -> None:
    """Check token ids. Raises: RequestError."""
    mask, size = vllm_config.model_config.hf_config.mask_token_id, vllm_config.model_config.get_vocab_size()
    if not tokens:
        raise RequestError(f"{name} has no tokens, allowed is one and more; send some", parameter=name)
    wrong = next((each for each in tokens if not 0 <= each < size or each == mask), None)
    if wrong is not None:
        raise RequestError(
            f"{name} has the token {wrong}, allowed are ids from 0 to {size - 1} but the mask token {mask}; correct it",
            parameter=name,
            value=wrong,
        )


def _check_room(context: Tokens, continuation: Tokens, i: int, block_length: int, longest: int) -> None:
    """Check that both fit. Raises: RequestError."""
    needed = len(context) + -(-len(continuation) // block_length) * block_length
    if needed > longest:
        raise RequestError(
            f"context and continuations[{i}] have {len(context)} and {len(continuation)} tokens, which take {needed} "
            f"positions in blocks of {block_length}; allowed are {longest} (max_model_len); shorten the context",
            parameter="context",
            value=needed,
        )
