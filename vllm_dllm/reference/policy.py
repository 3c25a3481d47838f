"""One step of a block, as published: which masked positions it unmasks, and with which tokens.

Sources, and their names for our policies:

    LLaDA      ML-GSAI/LLaDA `generate.py` at b7e6c35, arXiv:2502.09992 sec. 2.4 and app. B.4: `static` is
               "low_confidence", `random`
    Fast-dLLM  NVlabs/Fast-dLLM, arXiv:2505.22618 sec. 3.3: `threshold`, `factor`
    Dream      DreamLM/Dream `generation_utils.py`, arXiv:2508.15487: `static` is "maskgit_plus", `margin` is
               "topk_margin", `entropy`, `origin`
    SDAR       JetAstra/SDAR `generate.py`, arXiv:2510.06303: `sequential`, `static` is "low_confidence_static",
               `dynamic` is "low_confidence_dynamic", `entropy_bounded`
    dInfer     inclusionAI/dInfer `CreditThresholdParallelDecoder`, arXiv:2510.06133: `credit`, see `reference.credit`
    Nemotron-Labs-Diffusion   `threshold`; without a threshold `static`
    Fast-dLLM v2              `generation_functions.py`, arXiv:2509.26328: `dynamic`
    LLaDA2.0   `generate` of inclusionAI/LLaDA2.0-mini: `dynamic`

A step takes the most probable (or a sampled) token of each masked position with a score, and unmasks the positions of
the highest scores; the policy says what the score is, and how many. Additions of ours are marked "ours". The published
decoders draw noise from torch's global generator; here it is a function of what it is drawn for (`vllm_dllm.noise`),
so that an engine can draw the same. Batch of one.
"""

from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from vllm_dllm.names import PolicyName
from vllm_dllm.noise import STREAM, gumbel, stream_keys, uniform
from vllm_dllm.reference.constraint import BlockConstraint
from vllm_dllm.reference.credit import Credits
from vllm_dllm.reference.sampling import Sampling, choose_tokens, remove_tokens, sampled_logits

_UNSCHEDULED = ("threshold", "factor", "entropy_bounded", "credit")
_WITH_ALG_TEMP = ("static", "margin", "entropy")

EPS = 1e-3
"""Dream's last time."""


@dataclass(frozen=True, slots=True)
class UnmaskPolicy:
    """Which positions a step unmasks.

    `static`, `random`, `margin`, `entropy` and `sequential` spread a block over its share of `steps` and differ in the
    score; `threshold`, `factor`, `dynamic`, `entropy_bounded` and `credit` take as many positions as are sure enough;
    `origin` draws for each position at which step it is unmasked.
    """

    name: PolicyName = "static"
    steps: int | None = None  # of the whole region, of each block for SDAR; None: one position per step
    threshold: float = 0.9
    factor: float = 1.0
    entropy_bound: float = 0.35  # nats
    credit_alpha: float = 0.7
    credit_beta: float = 0.8
    credit_gamma: float = 0.2
    alg_temp: float | None = None  # Dream: draw the positions from softmax(score / alg_temp); None and 0: the highest
    confidence_dtype: torch.dtype | None = None  # of the softmax; None: as the logits (LLaDA). Fast-dLLM: float64
    confidence_eos_eot_inf: bool = False  # LLaDA app. B.4
    eot_id: int | None = None  # <|eot_id|> is in no field of config.json; 126348 in LLaDA-8B
    # Ours: `position` takes the lowest position among equal scores. `torch` calls topk as published, on a tensor
    # of the published length, since the order of its ties depends on the length.
    tie_break: Literal["position", "torch"] = "position"

    def __post_init__(self) -> None:
        """Raise ValueError for fields that contradict each other."""
        if self.steps is not None and self.name in _UNSCHEDULED:
            raise ValueError(f"steps is {self.steps}, but policy '{self.name}' takes none; leave it out.")
        if self.alg_temp is not None and (self.name not in _WITH_ALG_TEMP or self.alg_temp < 0):
            raise ValueError(f"alg_temp is {self.alg_temp} with policy '{self.name}'; give >= 0 with {_WITH_ALG_TEMP}.")
        if self.confidence_eos_eot_inf and self.eot_id is None:
            raise ValueError("confidence_eos_eot_inf needs eot_id, which is None; give the id of <|eot_id|>.")


@dataclass(frozen=True, slots=True)
class Rules:
    """Where the decoders of the families differ."""

    # `causal`: what is stored sees what is before it, position by position; a block sees itself too.
    attention: Literal["bidirectional", "block_causal", "causal"] = "bidirectional"
    logit_shift: bool = False  # the row of position p predicts the token at p + 1
    schedule: Literal["even", "timesteps"] = "even"
    # A block's first position is decided alone and first: by a refresh (Fast-dLLM's Dream), or, where K/V never change,
    # by the last row of the forward that stored what is before the block, as an autoregressive model's next token.
    unmasks_first_alone: bool = False
    sub_block_length: int | None = None  # Fast-dLLM v2: a block's parts are decided one after another
    # Of the distribution as the model gives it, or after temperature and filters. At temperature 0 they are one.
    confidence: Literal["model", "sampled"] = "model"


LLADA = Rules()
DREAM = Rules(logit_shift=True, schedule="timesteps", unmasks_first_alone=True, confidence="sampled")
SDAR = Rules(attention="block_causal", confidence="sampled")
NEMOTRON = Rules(attention="causal", unmasks_first_alone=True)
FAST_DLLM = Rules(
    attention="block_causal", logit_shift=True, unmasks_first_alone=True, sub_block_length=8, confidence="sampled"
)
STABLE_DIFFCODER = Rules(attention="block_causal")
LLADA2 = Rules(attention="block_causal", confidence="sampled")


def static_counts(num_masked: int, steps: int) -> list[int]:
    """Spread `num_masked` positions over steps, the first ones taking the remainder (`get_num_transfer_tokens`)."""
    return [num_masked // steps + (step < num_masked % steps) for step in range(steps)]


def reveal_times(steps: int) -> Tensor:
    """Return Dream's times, from 1 to EPS; [steps + 1] float32."""
    return torch.linspace(1, EPS, steps + 1)


def timestep_counts(num_masked: int, steps: int, first: int = 0) -> list[int]:
    """Spread `num_masked` positions over the steps from `first` on as Dream does, in its float32.

    A step from time t to s unmasks the share 1 - s / t of what is masked, rounded down; the last step takes the rest.
    With as many steps as positions, rounding makes that 0, 1, 1, ..., 1, 2.
    """
    times = reveal_times(steps)
    counts = []
    for step in range(first, steps):
        share = int(num_masked * (1 - times[step + 1] / times[step]))
        counts.append(share if step < steps - 1 else num_masked)
        num_masked -= counts[-1]
    return counts


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


def dynamic_count(confidence: Tensor, threshold: float, scheduled: int) -> int:
    """Count the positions of confidence > threshold, at least as many as the schedule gives (SDAR).

    Args:
        confidence: [num_masked].
        threshold: in [0, 1].
        scheduled: positions that the schedule gives this step.
    """
    return max(scheduled, int((confidence > threshold).sum()))


def entropy_bounded_count(entropy: Tensor, bound: float) -> int:
    """Count the positions of least entropy whose entropies add up to less than a bound, at least one.

    SDAR's published code adds probabilities instead; this is what it is for, as JetEngine has it.

    Args:
        entropy: [num_masked], ascending, in nats.
        bound: in nats.
    """
    return max(1, int(torch.searchsorted(entropy.cumsum(0), bound)))


def scores(logits: Tensor, tokens: Tensor, positions: Tensor, keys: Tensor, policy: UnmaskPolicy) -> Tensor:
    """Score each position; a step unmasks those of the highest scores.

    Args:
        logits: [num_positions, vocab], of the distribution that the confidence is taken of.
        tokens: [num_positions] int64, chosen.
        positions: [num_positions] int64.
        keys: [num_positions] int64, noise streams.

    Returns: [num_positions]: minus the position (`sequential`), a uniform number (`random`), minus the entropy in nats
        (`entropy`, `entropy_bounded`), the lead of the likeliest token (`margin`), else the chosen token's probability.
    """
    if policy.name == "sequential":
        return -positions.double()
    if policy.name == "random":
        return uniform(keys, STREAM)
    probs = logits.softmax(-1)
    if policy.name in ("entropy", "entropy_bounded"):
        score: Tensor = -torch.special.entr(probs).sum(-1)
    elif policy.name == "margin":
        first, second = probs.topk(2).values.unbind(-1)
        score = first - second
    else:
        score = probs.gather(-1, tokens[:, None]).squeeze(-1)
    if policy.alg_temp:  # the highest of these are drawn without replacement with weights softmax(score / alg_temp)
        return score / policy.alg_temp + gumbel(keys, STREAM)
    return score


def unmask_count(policy: UnmaskPolicy, score: Tensor, scheduled: int) -> int:
    """Say how many of the masked positions, in order of their scores, a step unmasks.

    Args:
        score: [num_masked], descending.
        scheduled: what the schedule gives this step.
    """
    if policy.name in {"threshold", "credit"}:
        return threshold_count(score, policy.threshold)
    if policy.name == "factor":
        return factor_count(score, policy.factor)
    if policy.name == "dynamic":
        return dynamic_count(score, policy.threshold, scheduled)
    if policy.name == "entropy_bounded":
        return entropy_bounded_count(-score, policy.entropy_bound)
    return scheduled


def rank_positions(score: Tensor, count: int, tie_break: str) -> Tensor:
    """Return the `count` indices of highest score [len], ties as `UnmaskPolicy.tie_break` says; [count] int64."""
    if tie_break == "torch":
        return score.topk(count).indices
    return score.sort(descending=True, stable=True).indices[:count]


@dataclass(frozen=True)
class Block:
    """A block of one request, and what decides its steps."""

    begin: int  # absolute position
    length: int
    num_masked: int  # when it begins: `length` without what the prompt's end takes of it
    steps: int
    policy: UnmaskPolicy
    sampling: Sampling
    rules: Rules
    eos_id: int
    credits: Credits = field(default_factory=Credits)  # so far
    constraint: BlockConstraint | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for steps that the policy cannot take."""
        if self.policy.name == "dynamic" and self.length % self.steps:
            message = f"steps is {self.steps} for blocks of {self.length} under policy 'dynamic'; give a divisor."
            raise ValueError(message)

    @cached_property
    def counts(self) -> list[int]:
        """How many positions each step unmasks by the schedule; what unmasks nothing needs no forward and is no step.

        Fast-dLLM's Dream counts the step that unmasks the first position alone as step 0 of the schedule; Nemotron
        spreads the others over all steps.
        """
        if self.rules.schedule == "even":
            first = int(self.rules.unmasks_first_alone)
            counts = [first, *static_counts(self.length - first, self.steps)]
        elif self.rules.unmasks_first_alone:
            counts = [1, *(timestep_counts(self.length - 1, self.steps, first=1) or [self.length - 1])]
        else:
            counts = timestep_counts(self.length, self.steps)
        return [count for count in counts if count]

    def scheduled(self, num_masked: int) -> int:
        """Return the count of the step whose share of the block begins where `num_masked` positions are masked.

        Where a policy has unmasked more than the schedule gave, it is the step whose share holds the next position.
        """
        num_unmasked = self.num_masked - num_masked
        return next(c for c, end in zip(self.counts, accumulate(self.counts), strict=True) if num_unmasked < end)

    def stage(self, positions: Tensor) -> Tensor:
        """Return which of the masked positions [num_masked] the next step may unmask; the first of them always."""
        first = int(positions[0])
        if self.rules.unmasks_first_alone and first == self.begin:
            return positions == first
        if self.rules.sub_block_length is None:
            return torch.ones_like(positions, dtype=torch.bool)
        part = (positions - self.begin) // self.rules.sub_block_length
        return part == part[0]

    def known(self, positions: Tensor) -> Tensor | None:
        """Return which of the masked positions [num_open] the next step unmasks, where no score decides it; bool."""
        if self.policy.name != "origin":
            return None
        # Drawn once, and unmasked in the step from t to s if s <= drawn < t: of what is masked at t, a share 1 - s / t.
        seeds = torch.full_like(positions, self.sampling.seed)
        drawn = uniform(stream_keys(seeds, positions, torch.zeros_like(positions)), STREAM)
        for time in reveal_times(self.steps)[1:-1]:
            is_revealed: Tensor = drawn >= time
            if is_revealed.any():
                return is_revealed
        return torch.ones_like(positions, dtype=torch.bool)


def unmask(logits: Tensor, is_masked: Tensor, *, first: int, block: Block) -> tuple[Tensor, Tensor]:
    """Choose the positions that a step unmasks, and their tokens.

    Args:
        logits: [span_len, vocab], predictions of the positions from `first` on.
        is_masked: [span_len] bool, masked positions of the block; False outside it.
        first: absolute position.

    Returns: indices into the span and their tokens, two [count] int64.
    """
    policy, sampling = block.policy, block.sampling
    masked = is_masked.nonzero().squeeze(-1)  # [num_masked]
    num_masked = len(masked)
    rows = masked[block.stage(first + masked)]  # [num_open]
    positions = first + rows
    keys = stream_keys(torch.full_like(rows, sampling.seed), positions, torch.full_like(rows, num_masked))
    logits = remove_tokens(logits[rows], sampling.forbidden_ids + ((block.eos_id,) if sampling.logits_eos_inf else ()))
    if policy.name == "credit":
        alpha, beta, gamma = policy.credit_alpha, policy.credit_beta, policy.credit_gamma
        logits = block.credits.fuse(logits.double(), positions, alpha=alpha, beta=beta, gamma=gamma)
    tokens = choose_tokens(logits, keys, sampling)
    known = block.known(positions)
    if known is not None:
        return rows[known], tokens[known]
    logits = logits.to(policy.confidence_dtype or logits.dtype)
    if block.rules.confidence == "sampled":
        logits = sampled_logits(logits, sampling)
    if policy.confidence_eos_eot_inf and policy.eot_id is not None:
        # The published code removes EOS from the noisy logits, which are the logits themselves at temperature 0 only.
        logits = remove_tokens(logits, (policy.eot_id, block.eos_id) if sampling.temperature == 0 else (policy.eot_id,))
    score = scores(logits, tokens, positions, keys, policy)
    count = unmask_count(policy, score.sort(descending=True).values, block.scheduled(num_masked))
    count = min(count, len(rows))
    # The published threshold rule ranks all masked positions and drops the rest; the ties of topk depend on k.
    num_ranked = len(rows) if policy.name in {"threshold", "credit"} else count
    in_span = score.new_full(is_masked.shape, -torch.inf).index_copy(0, rows, score)
    chosen = rank_positions(in_span, num_ranked, policy.tie_break)[:count]
    chosen_tokens = torch.zeros_like(in_span, dtype=torch.int64).index_copy(0, rows, tokens)[chosen]
    return chosen, chosen_tokens
