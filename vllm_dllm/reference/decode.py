"""Block decoding of masked-diffusion models, as published: the decoding half of the oracle.

One loop covers two sources, which differ in three values:

    LLaDA      ML-GSAI/LLaDA `generate.py` at b7e6c35, arXiv:2502.09992 sec. 2.4 and app. B.4
    Fast-dLLM  NVlabs/Fast-dLLM `llada/generate.py`, arXiv:2505.22618 sec. 3.2 (KV policies `prefix` and `dual`) and
               sec. 3.3 (unmasking policies `threshold` and `factor`)

A step forwards the model, takes the most probable (or a sampled) token of each masked position of the block with a
confidence, and unmasks the positions of highest confidence; the unmasking policy says how many. Additions of ours are
marked "ours" where they are defined. The published decoders draw noise from torch's global generator; here it is a
function of what it is drawn for (`vllm_dllm.noise`), so that an engine can draw the same. Batch of one.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from vllm_dllm.noise import STREAM, gumbel, stream_keys, uniform
from vllm_dllm.reference.layers import LayerKv
from vllm_dllm.reference.model import LLaDA


@dataclass(frozen=True, slots=True)
class KvPolicy:
    """Which keys and values a forward computes anew.

    `none`: those of the whole sequence, at every step. `prefix`: those from the block's begin on; `dual`: those of
    the block. The others are kept from the last refresh, a forward over the whole sequence that every block begins
    with. Ours: `refresh_every=n` also refreshes at each step of a block whose index n divides; 1 is `none`.
    """

    name: Literal["none", "prefix", "dual"] = "none"
    refresh_every: int | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for a refresh interval that has no meaning."""
        if self.refresh_every is not None and (self.name == "none" or self.refresh_every < 1):
            message = f"refresh_every is {self.refresh_every} with KV policy '{self.name}'; give n >= 1 with a cache."
            raise ValueError(message)

    def span(self, step: int, begin: int, end: int, seq_len: int) -> tuple[int, int]:
        """Return the positions [first, last) that step `step` of block [begin, end) forwards."""
        is_refresh = step == 0 if self.refresh_every is None else step % self.refresh_every == 0
        if self.name == "none" or is_refresh:
            return 0, seq_len
        return begin, seq_len if self.name == "prefix" else end


@dataclass(frozen=True, slots=True)
class UnmaskPolicy:
    """Which positions a step unmasks.

    `static` ("low_confidence" in both sources) spreads a block evenly over its share of `steps`; `random` does so
    with uniform numbers as confidence; `threshold` and `factor` take as many positions as are confident enough.
    """

    name: Literal["static", "random", "threshold", "factor"] = "static"
    steps: int | None = None  # of the whole region, static and random; None: one position per step
    threshold: float = 0.9
    factor: float = 1.0
    confidence_dtype: torch.dtype | None = None  # of the softmax; None: as the logits (LLaDA). Fast-dLLM: float64
    confidence_eos_eot_inf: bool = False  # LLaDA app. B.4
    eot_id: int | None = None  # <|eot_id|> is in no field of config.json; 126348 in LLaDA-8B
    # Ours: `position` takes the lowest position among equal confidences. `torch` calls topk as published, on a tensor
    # of the published length, since the order of its ties depends on the length.
    tie_break: Literal["position", "torch"] = "position"

    def __post_init__(self) -> None:
        """Raise ValueError for fields that contradict each other."""
        if self.steps is not None and self.name not in ("static", "random"):
            raise ValueError(f"steps is {self.steps}, but policy '{self.name}' takes none; leave it out.")
        if self.confidence_eos_eot_inf and self.eot_id is None:
            raise ValueError("confidence_eos_eot_inf needs eot_id, which is None; give the id of <|eot_id|>.")


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a step chooses the token of a position."""

    temperature: float = 0.0
    cfg_scale: float = 0.0  # LLaDA: classifier-free guidance against the sequence with its prompt masked
    logits_eos_inf: bool = False  # LLaDA app. B.4
    seed: int = 0
    # Ours: filters of softmax(logits / temperature), first top_k, then top_p of what is left; the confidence ignores
    # them. Tokens that may never be chosen; an engine lists the mask token.
    top_k: int | None = None
    top_p: float | None = None
    forbidden_ids: tuple[int, ...] = ()


_UNCACHED, _STATIC, _GREEDY = KvPolicy(), UnmaskPolicy(), Sampling()


@dataclass(frozen=True, slots=True)
class Generation:
    """What a call of `generate` did; guidance doubles both counts of forwards."""

    tokens: Tensor  # [gen_length] int64
    nfe: int  # forwards of the model
    nfe_refresh: int  # those of them that spanned the whole sequence
    history: Tensor  # [num_steps, gen_length] int64: the generated region after each step


def static_counts(num_masked: int, steps: int) -> list[int]:
    """Spread `num_masked` positions over steps, the first ones taking the remainder (`get_num_transfer_tokens`)."""
    return [num_masked // steps + (step < num_masked % steps) for step in range(steps)]


def threshold_count(confidence: Tensor, threshold: float) -> int:
    """Count the positions of confidence >= threshold, at least one (Fast-dLLM sec. 3.3).

    Args:
        confidence: [num_masked], descending.
        threshold: in [0, 1].
    """
    return max(1, int((confidence >= threshold).sum()))


def factor_count(confidence: Tensor, factor: float) -> int:
    """Count the positions that the factor rule unmasks (Fast-dLLM sec. 3.3, `get_transfer_index_dynamic`).

    n positions may go together if the n-th is confident beyond 1 - factor / (n + 1). As in the published code, a
    first failure at the last position still unmasks all.

    Args:
        confidence: [num_masked], descending.
        factor: > 0; larger unmasks more.
    """
    num_masked = len(confidence)
    bounds = [-1.0] + [1 - factor / (n + 1) for n in range(2, num_masked + 1)]
    failed = [j for j, bound in enumerate(bounds) if confidence[j] < bound]
    j = failed[0] if failed else num_masked - 1
    return j + 1 if j in (0, num_masked - 1) else j


def unmask_count(policy: UnmaskPolicy, confidence: Tensor, static_count: int) -> int:
    """Say how many of the masked positions, in order of confidence, a step unmasks.

    Args:
        confidence: [num_masked], descending.
        static_count: what the static schedule gives this step.
    """
    if policy.name == "threshold":
        return threshold_count(confidence, policy.threshold)
    if policy.name == "factor":
        return factor_count(confidence, policy.factor)
    return static_count


def filter_logits(scaled: Tensor, sampling: Sampling) -> Tensor:
    """Set the logits of tokens outside top_k and top_p to -inf (ours).

    top_k keeps every value that equals the k-th largest. top_p keeps the fewest tokens, most probable first and
    lowest id first among equals, whose mass reaches top_p.

    Args:
        scaled: [num_positions, vocab] float64, logits / temperature.

    Returns: the same shape.
    """
    if sampling.top_k is not None and sampling.top_k < scaled.shape[-1]:
        smallest_kept = scaled.topk(sampling.top_k).values[:, -1:]
        scaled = scaled.masked_fill(scaled < smallest_kept, -torch.inf)
    if sampling.top_p is not None:
        probs, ids = scaled.softmax(-1).sort(descending=True, stable=True)
        mass_before = probs.cumsum(-1) - probs
        is_outside = torch.zeros_like(scaled, dtype=torch.bool).scatter(-1, ids, mass_before >= sampling.top_p)
        is_outside.scatter_(-1, ids[:, :1], value=False)
        scaled = scaled.masked_fill(is_outside, -torch.inf)
    return scaled


def choose_tokens(logits: Tensor, keys: Tensor, sampling: Sampling) -> Tensor:
    """Choose a token per position: the first maximum of logits + temperature * Gumbel noise, in float64.

    The published score exp(logits) / (-ln u)^temperature has the same maximum.

    Args:
        logits: [num_positions, vocab].
        keys: [num_positions] int64, noise streams.

    Returns: [num_positions] int64.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    wide = logits.double()
    kept = filter_logits(wide / sampling.temperature, sampling) > -torch.inf
    noise = gumbel(keys[:, None], torch.arange(logits.shape[-1], device=logits.device))
    return (wide + sampling.temperature * noise).masked_fill(~kept, -torch.inf).argmax(-1)


def confidences(logits: Tensor, tokens: Tensor, keys: Tensor, policy: UnmaskPolicy) -> Tensor:
    """Score each position by the probability of its chosen token, or by a uniform number (`random`).

    Args:
        logits: [num_positions, vocab].
        tokens: [num_positions] int64.
        keys: [num_positions] int64, noise streams.

    Returns: [num_positions], in [0, 1].
    """
    if policy.name == "random":
        return uniform(keys, torch.tensor(STREAM, device=keys.device))
    probs = logits.to(policy.confidence_dtype or logits.dtype).softmax(-1)
    return probs.gather(-1, tokens[:, None]).squeeze(-1)


def rank_positions(confidence: Tensor, count: int, tie_break: str) -> Tensor:
    """Return the `count` indices of highest confidence [len], ties as `UnmaskPolicy.tie_break` says; [count] int64."""
    if tie_break == "torch":
        return confidence.topk(count).indices
    return confidence.sort(descending=True, stable=True).indices[:count]


def unmask(
    logits: Tensor,
    is_masked: Tensor,
    *,
    first: int,
    static_count: int,
    policy: UnmaskPolicy,
    sampling: Sampling,
    eos_id: int,
) -> tuple[Tensor, Tensor]:
    """Choose the positions that a step unmasks, and their tokens.

    Args:
        logits: [span_len, vocab], of the positions from `first` on that the step forwarded.
        is_masked: [span_len] bool, masked positions of the block; False outside it.
        static_count: what the static schedule gives this step.

    Returns: indices into the span and their tokens, two [count] int64.
    """
    rows = is_masked.nonzero().squeeze(-1)  # [num_masked]
    positions = first + rows
    keys = stream_keys(torch.full_like(rows, sampling.seed), positions, torch.full_like(rows, len(rows)))
    logits = _remove(logits[rows], sampling.forbidden_ids + ((eos_id,) if sampling.logits_eos_inf else ()))
    tokens = choose_tokens(logits, keys, sampling)
    if policy.confidence_eos_eot_inf and policy.eot_id is not None:
        # The published code removes EOS from the noisy logits, which are the logits themselves at temperature 0 only.
        logits = _remove(logits, (policy.eot_id, eos_id) if sampling.temperature == 0 else (policy.eot_id,))
    confidence = confidences(logits, tokens, keys, policy)
    count = unmask_count(policy, confidence.sort(descending=True).values, static_count)
    # The published threshold rule ranks all masked positions and drops the rest; the ties of topk depend on k.
    num_ranked = len(rows) if policy.name == "threshold" else count
    in_span = confidence.new_full(is_masked.shape, -torch.inf).index_copy(0, rows, confidence)
    chosen = rank_positions(in_span, num_ranked, policy.tie_break)[:count]
    chosen_tokens = torch.zeros_like(in_span, dtype=torch.int64).index_copy(0, rows, tokens)[chosen]
    return chosen, chosen_tokens


def _remove(logits: Tensor, ids: tuple[int, ...]) -> Tensor:
    """Return logits [..., vocab] with those of the given ids at -inf."""
    return logits.index_fill(-1, torch.tensor(ids, dtype=torch.int64, device=logits.device), -torch.inf)


@dataclass(slots=True)
class _Predictor:
    """Forwards spans of the sequence and keeps the keys and values of the last refresh."""

    model: LLaDA
    is_prompt: Tensor  # [seq_len] bool
    cfg_scale: float
    kept: list[list[LayerKv] | None] = field(default_factory=lambda: [None, None])  # the sequence, its unguided twin
    nfe: int = 0
    nfe_refresh: int = 0

    def logits(self, tokens: Tensor, first: int, last: int) -> Tensor:
        """Predict positions [first, last) of tokens [seq_len]; returns [last - first, vocab], guided if asked."""
        logits = self._forward(0, tokens, first, last)
        if self.cfg_scale == 0:
            return logits
        unguided = self._forward(1, tokens.masked_fill(self.is_prompt, self.model.config.mask_token_id), first, last)
        return unguided + (self.cfg_scale + 1) * (logits - unguided)

    def _forward(self, twin: int, tokens: Tensor, first: int, last: int) -> Tensor:
        is_refresh = last - first == len(tokens)
        logits, kv = self.model.forward(tokens[first:last], first, None if is_refresh else self.kept[twin])
        self.nfe += 1
        if is_refresh:
            self.nfe_refresh += 1
            self.kept[twin] = kv
        return logits


def _steps_per_block(gen_length: int, block_length: int, steps: int | None) -> int:
    """Divide the lengths as LLaDA does; raises ValueError where they do not divide."""
    if gen_length % block_length:
        raise ValueError(f"gen_length is {gen_length}, no multiple of block_length {block_length}; round it up.")
    num_blocks = gen_length // block_length
    if steps is None:
        return block_length
    if steps % num_blocks or steps < 1:
        raise ValueError(f"steps is {steps} for {num_blocks} blocks; give a positive multiple of {num_blocks}.")
    return steps // num_blocks


@torch.no_grad()
def generate(
    model: LLaDA,
    prompt: Tensor,
    *,
    gen_length: int,
    block_length: int,
    kv: KvPolicy = _UNCACHED,
    policy: UnmaskPolicy = _STATIC,
    sampling: Sampling = _GREEDY,
) -> Generation:
    """Generate `gen_length` tokens after a prompt [prompt_len] int64, block by block.

    EOS ends nothing: the tokens after it are decoded too, as published. Prompt positions are never masked, whatever
    their ids. Raises ValueError for lengths that do not divide.
    """
    static = static_counts(block_length, _steps_per_block(gen_length, block_length, policy.steps))
    tokens = torch.cat((prompt, prompt.new_full((gen_length,), model.config.mask_token_id)))
    is_masked = torch.arange(len(tokens), device=prompt.device) >= len(prompt)
    predictor = _Predictor(model, ~is_masked, sampling.cfg_scale)
    history: list[Tensor] = []
    for begin in range(len(prompt), len(tokens), block_length):
        end = begin + block_length
        for step, static_count in enumerate(static):
            # The published LLaDA loop goes on; but without masks in the block a forward changes nothing.
            if not is_masked[begin:end].any():
                break
            first, last = kv.span(step, begin, end, len(tokens))
            logits = predictor.logits(tokens, first, last)
            in_block = torch.zeros_like(is_masked)
            in_block[begin:end] = is_masked[begin:end]
            chosen, chosen_tokens = unmask(
                logits,
                in_block[first:last],
                first=first,
                static_count=static_count,
                policy=policy,
                sampling=sampling,
                eos_id=model.config.eos_token_id,
            )
            tokens[first + chosen] = chosen_tokens
            is_masked[first + chosen] = False
            history.append(tokens[len(prompt) :].clone())
    return Generation(tokens[len(prompt) :], predictor.nfe, predictor.nfe_refresh, torch.stack(history))
