"""Unmasking policies as tensor code over a whole batch.

A policy is an order of the masked positions and a count: a step unmasks the first ones, highest score first, lowest
position first among equals, which `torch.topk` leaves open. The next canvas is a function of the canvas, what the model
says of it, and what the policy remembers of the block, which most policies do not (`unmask.memory`).

Sources: LLaDA `generate` (arXiv:2502.09992) for static and random; Fast-dLLM v1 (arXiv:2505.22618) for threshold and
factor; Dream `diffusion_generate` (arXiv:2508.15487) for margin, entropy, origin and `alg_temp`; SDAR
`block_diffusion_generate` (arXiv:2510.06303) for sequential, dynamic and entropy_bounded; credit is in `unmask.credit`.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import reduce

import torch
from torch import Tensor

from vllm_dllm import noise
from vllm_dllm.ops.vocab_stats import Distribution
from vllm_dllm.unmask.credit import CREDIT
from vllm_dllm.unmask.memory import Memory, PolicyState


@dataclass(frozen=True, slots=True)
class OwnParams:
    """What a policy without a native twin (`unmask.torch_policy`) takes besides `PolicyParams`."""

    name: str
    values: dict[str, Tensor]  # parameter -> [num_canvases] float64
    prompt_len: Tensor  # [num_canvases] int64, positions, as all that follows without pins
    seq_len: Tensor  # [num_canvases] int64, positions
    vocab_size: int
    weights: dict[str, Tensor]  # of its net; empty: it has none


@dataclass(frozen=True, slots=True)
class PolicyParams:
    """One policy per canvas, as device tensors; what the host knows of all spares stages that none needs."""

    policy_id: Tensor  # [num_canvases] int64, POLICY_IDS
    seed: Tensor  # [num_canvases] int64
    prompt_len: Tensor  # [num_canvases] int64, positions; of a block with pins, as if the prompt had as many more
    start: Tensor  # [num_canvases] int64, absolute position of the block
    threshold: Tensor  # [num_canvases] float64
    factor: Tensor  # [num_canvases] float64
    entropy_bound: Tensor  # [num_canvases] float64, nats
    credit_alpha: Tensor  # [num_canvases] float64, as the next two of `unmask.credit`
    credit_beta: Tensor  # [num_canvases] float64
    credit_gamma: Tensor  # [num_canvases] float64
    alg_temp: Tensor  # [num_canvases] float64, 0 draws no positions
    temperature: Tensor  # [num_canvases] float64, of the sampled distribution
    counts: Tensor  # [block_length, num_canvases] int64, schedule.count_table
    times: Tensor  # [block_length, num_canvases] float64, schedule.reveal_times
    policies: tuple[str, ...]  # those of the requests
    has_alg_temp: bool  # any above 0
    own: "OwnParams | None" = None  # of a policy without a native twin, which all requests have then

    @property
    def tensors(self) -> list[Tensor]:
        """The fields on the device, in their order."""
        values = (getattr(self, field.name) for field in fields(self))
        return [value for value in values if isinstance(value, Tensor)]

    @property
    def num_known(self) -> Tensor:
        """[num_canvases] int64, positions of the block that were known when it began: the prompt's end, and pins."""
        return (self.prompt_len - self.start).clamp(min=0)

    @property
    def position(self) -> Tensor:
        """[num_canvases, block_length] int64, absolute."""
        return self.start[:, None] + torch.arange(len(self.counts), device=self.start.device)

    def of_next_block(self, block_length: int) -> "PolicyParams":
        """Return the same for the blocks behind these."""
        return replace(self, start=self.start + block_length)


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the positions of some canvases are scored by."""

    distribution: Distribution  # [num_canvases * block_length]
    is_masked: Tensor  # [num_canvases, block_length] bool

    def keys(self, params: PolicyParams) -> Tensor:
        """Return the noise streams of the step; [num_canvases, block_length] int64."""
        num_masked = self.is_masked.sum(1, keepdim=True)
        return noise.stream_keys(params.seed[:, None], params.position, num_masked)


@dataclass(frozen=True, slots=True)
class Left:
    """What some canvases have left."""

    num_masked: Tensor  # [num_canvases] int64, positions
    num_open: Tensor  # [num_canvases] int64, those of them that the step may unmask


@dataclass(frozen=True, slots=True)
class Policy:
    """An order of positions, and how many of them a step unmasks.

    Attributes:
        score: [num_canvases, block_length] float64 of each position.
        count: [num_canvases] int64 of the scores in descending order, -inf behind the open positions, and of `Left`;
            `choose_positions` keeps it within 1..num_open.
        memory: what changes the rows' distributions before they are scored; None: nothing does.
    """

    score: Callable[[Evidence, PolicyParams], Tensor]
    count: Callable[[Tensor, Left, PolicyParams], Tensor]
    memory: Memory | None = None


def _confidence(evidence: Evidence, _params: PolicyParams) -> Tensor:
    return evidence.distribution.confidence.view_as(evidence.is_masked)


def _margin(evidence: Evidence, _params: PolicyParams) -> Tensor:
    return evidence.distribution.margin.view_as(evidence.is_masked)


def _certainty(evidence: Evidence, _params: PolicyParams) -> Tensor:
    return -evidence.distribution.entropy.view_as(evidence.is_masked)


def _uniform(evidence: Evidence, params: PolicyParams) -> Tensor:
    return noise.uniform(evidence.keys(params), noise.STREAM)


def _leftmost(_evidence: Evidence, params: PolicyParams) -> Tensor:
    return -params.position.double()


def _earliest(_evidence: Evidence, params: PolicyParams) -> Tensor:
    """Score a position by the step that reveals it: the first one whose end is not after its own time.

    Each position draws its time once. So one that is masked at t is revealed by the step from t to s with the published
    probability 1 - s / t, whenever it is asked.
    """
    position = params.position
    own_time = noise.uniform(
        noise.stream_keys(params.seed[:, None], position, torch.zeros_like(position)), noise.STREAM
    )
    return -torch.searchsorted((-params.times.T).contiguous(), -own_time).double()


def scheduled_count(num_masked: Tensor, params: PolicyParams) -> Tensor:
    """Return how many positions requests' steps give canvases; arguments and result [num_canvases] int64."""
    block_length = len(params.counts)
    num_unmasked = block_length - params.num_known - num_masked
    return params.counts.gather(0, num_unmasked.clamp(0, block_length - 1)[None]).squeeze(0)


def _scheduled(_ordered: Tensor, left: Left, params: PolicyParams) -> Tensor:
    return scheduled_count(left.num_masked, params)


def _reaching(ordered: Tensor, _left: Left, params: PolicyParams) -> Tensor:
    return (ordered >= params.threshold[:, None]).sum(1)


def _exceeding(ordered: Tensor, left: Left, params: PolicyParams) -> Tensor:
    return torch.maximum((ordered > params.threshold[:, None]).sum(1), _scheduled(ordered, left, params))


def _factor_run(ordered: Tensor, left: Left, params: PolicyParams) -> Tensor:
    """Count the longest run that satisfies `confidence[n] >= 1 - f / (n + 1)` for the n-th position, from 1.

    Failing at the last position alone unmasks it too, as Fast-dLLM's code does.
    """
    rank = torch.arange(ordered.shape[1], device=ordered.device)
    # Rank 0 is always unmasked: Fast-dLLM's first threshold is -1. Ranks behind the masked ones fail by their -inf.
    fails = ordered < 1.0 - params.factor[:, None] / (rank + 2)
    fails[:, 0] = False
    run = torch.where(fails, rank, ordered.shape[1]).amin(1)
    return torch.where(run == left.num_open - 1, left.num_open, run)


def _within_bound(ordered: Tensor, _left: Left, params: PolicyParams) -> Tensor:
    """Count the entropies, ascending, whose running sum is below the bound."""
    return ((-ordered).cumsum(1) < params.entropy_bound[:, None]).sum(1)


def _equal_first(ordered: Tensor, _left: Left, _params: PolicyParams) -> Tensor:
    return (ordered == ordered[:, :1]).sum(1)


POLICIES: dict[str, Policy] = {
    "static": Policy(_confidence, _scheduled),
    "random": Policy(_uniform, _scheduled),
    "threshold": Policy(_confidence, _reaching),
    "factor": Policy(_confidence, _factor_run),
    "margin": Policy(_margin, _scheduled),
    "entropy": Policy(_certainty, _scheduled),
    "origin": Policy(_earliest, _equal_first),
    "sequential": Policy(_leftmost, _scheduled),
    "dynamic": Policy(_confidence, _exceeding),
    "entropy_bounded": Policy(_certainty, _within_bound),
    "credit": Policy(_confidence, _reaching, CREDIT),
}

SCHEDULED = frozenset(name for name, policy in POLICIES.items() if policy.count is _scheduled)
"""Policies of which a request's table alone says how many positions a step unmasks."""

POLICY_IDS: dict[str, int] = {name: number for number, name in enumerate(POLICIES)}

MEMORIES = {POLICY_IDS[name]: policy.memory for name, policy in POLICIES.items() if policy.memory is not None}
"""Of the policies with one; no two share a field."""


STATE_FIELDS = {name: field for memory in MEMORIES.values() for name, field in memory.fields.items()}


def new_state(num_canvases: int, block_length: int, device: torch.device) -> PolicyState:
    """Return what policies remember of blocks that begin."""
    return {name: field.new(num_canvases, block_length, device) for name, field in STATE_FIELDS.items()}


def asked_ids(state: PolicyState) -> Tensor | None:
    """Return the ids whose logits canvases' policies ask for; [num_canvases, block_length, num_given]; None: none."""
    asked = [state[memory.asks] for memory in MEMORIES.values() if memory.asks in state]
    return reduce(torch.maximum, asked) if asked else None


def score_positions(evidence: Evidence, params: PolicyParams) -> Tensor:
    """Score positions by their policies; [num_canvases, block_length] float64.

    With `alg_temp` a step draws positions without replacement, with probabilities ~ exp(score / alg_temp): those of
    the largest sums with Gumbel noise.
    """
    score = _by_policy(params, lambda policy: policy.score(evidence, params))
    if not params.has_alg_temp:
        return score
    alg_temp = params.alg_temp[:, None]
    drawn = score / torch.where(alg_temp > 0, alg_temp, 1.0) + noise.gumbel(evidence.keys(params), noise.STREAM)
    # The quotient may overflow; -inf stands for positions that are not masked.
    return torch.where(alg_temp > 0, drawn.clamp(min=torch.finfo(drawn.dtype).min), score)


def choose_positions(score: Tensor, is_masked: Tensor, params: PolicyParams, is_open: Tensor | None = None) -> Tensor:
    """Choose the positions of each canvas that this step unmasks.

    Args:
        score: [num_canvases, block_length] float64.
        is_masked: [num_canvases, block_length] bool.
        params: the policies.
        is_open: those of the masked positions that may be chosen, at least one if there are any; None: all.

    Returns: [num_canvases, block_length] bool, a subset of `is_open`; empty for a canvas without masked positions.
    """
    is_open = is_masked if is_open is None else is_open
    ordered, order = torch.sort(score.masked_fill(~is_open, -torch.inf), dim=1, descending=True, stable=True)
    left = Left(is_masked.sum(1), is_open.sum(1))
    count = _by_policy(params, lambda policy: policy.count(ordered, left, params))
    rank = torch.arange(score.shape[1], device=score.device).expand_as(order)
    chosen = torch.zeros_like(is_masked).scatter_(1, order, rank < count.clamp(min=1)[:, None])
    return chosen & is_open


def _by_policy(params: PolicyParams, of: Callable[[Policy], Tensor]) -> Tensor:
    """Evaluate the policies that occur, and take each canvas's own; [num_canvases, ...]."""
    first, *others = params.policies
    values = of(POLICIES[first])
    for name in others:
        is_its = (params.policy_id == POLICY_IDS[name]).view(-1, *[1] * (values.dim() - 1))
        values = torch.where(is_its, of(POLICIES[name]), values)
    return values
