"""Policies without a native twin: torch functions from what canvases show, and what was kept of them, to the next ones.

Those that come with us are in `unmask.policies`, those of users in packages of their own (`unmask.registry`). The walk
decides them beside the native op's requests, in the same batch, once more in torch (`vllm_dllm.apart`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vllm_dllm import noise
from vllm_dllm.ops.vocab_stats import Distribution, PartialStats
from vllm_dllm.unmask.memory import PolicyState, StateField
from vllm_dllm.unmask.parameter import MAX_PARAMETERS, Parameter
from vllm_dllm.unmask.policy import PolicyParams, scheduled_count
from vllm_dllm.unmask.schedule import UnmaskRules

SHARED_OPTIONS = ("threshold", "steps")
"""Options of the native policies that one of these may take too."""

CHANGING_STEPS = 8
"""Steps of a block, per position of it, in which known tokens may change; behind them they stand, so that it ends."""

STEP = "step"
"""The field that is kept of every block: how many of its canvases were decided. No policy declares it."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What some canvases of different requests show. B is the block length; all numbers are float64, all ids int64."""

    canvas: Tensor  # [num_canvases, B], the mask token where masked
    is_masked: Tensor  # [num_canvases, B] bool
    is_open: Tensor  # [num_canvases, B] bool, masked positions that the step may unmask, one at least if any is masked
    rows: PartialStats  # [num_canvases * B] of the model, also of known positions; with the candidates
    distribution: Distribution  # [num_canvases * B], that the family's confidence is of
    step: Tensor  # [num_canvases], canvases of the block that were decided before
    params: PolicyParams  # `threshold`, `counts`, `position` and others
    rules: UnmaskRules
    mask_token_id: int

    @property
    def values(self) -> Mapping[str, Tensor]:
        """The policy's parameters by name, [num_canvases] each."""
        assert self.params.own is not None, "these canvases have such a policy"
        return self.params.own.values

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """The tensors of the policy's net, float64."""
        assert self.params.own is not None, "these canvases have such a policy"
        return self.params.own.weights

    @property
    def token_ids(self) -> Tensor:
        """[num_canvases, B], the token that each position takes if it is unmasked: likeliest, or drawn."""
        return self.rows.token_ids.view_as(self.canvas)

    @property
    def confidence(self) -> Tensor:
        """[num_canvases, B], the probability of that token."""
        return self.distribution.confidence.view_as(self.canvas)

    @property
    def margin(self) -> Tensor:
        """[num_canvases, B], by how much the likeliest token is above the second."""
        return self.distribution.margin.view_as(self.canvas)

    @property
    def entropy(self) -> Tensor:
        """[num_canvases, B], in nats."""
        return self.distribution.entropy.view_as(self.canvas)

    @property
    def known_probability(self) -> Tensor:
        """[num_canvases, B], the model's probability of the token that is known there; 0 where masked.

        Raises: AssertionError where the policy does not declare `asks_known`.
        """
        logits = self.rows.given_logits
        assert logits is not None, "only what a policy asks for is there"
        below = logits[:, 0].double() - self.rows.top_logits[:, 0].double()
        return (below.exp() / (1.0 + self.rows.rest)).view_as(self.canvas).masked_fill(self.is_masked, 0.0)

    def confidence_without(self, eos_too: Tensor) -> Tensor:
        """Return the probability of each position's token by the model's distribution without end tokens.

        That of an end token is 0. Only for policies that declare `asks_ends`.

        Args:
            eos_too: [num_canvases] bool, whether EOS is left out besides the end of turn.

        Returns: [num_canvases, B].
        """
        rows, ends = self.rows, torch.tensor(self.rules.end_ids, device=self.canvas.device)
        assert rows.given_logits is not None, "only what a policy asks for is there"
        is_out = torch.stack([eos_too, torch.ones_like(eos_too)], 1).repeat_interleave(self.canvas.shape[1], 0)
        top, first = rows.top_logits[:, 0].double(), rows.top_ids[:, :1]
        below = (rows.given_logits[:, :2].double() - top[:, None]).exp()
        is_first = ((first == ends) & is_out).any(1)
        # The sum without the largest term is kept, so that nothing cancels where that is what is left out.
        mass = torch.where(is_first, 0.0, 1.0) + rows.rest - (below * (is_out & (first != ends))).sum(1)
        own = (rows.token_logits.double() - top).exp() / mass
        is_end = ((rows.token_ids[:, None] == ends) & is_out).any(1)
        return own.masked_fill(is_end, 0.0).view_as(self.canvas)

    @property
    def is_written(self) -> Tensor:
        """[num_canvases, B] bool, known positions that are no prompt."""
        assert self.params.own is not None, "these canvases have such a policy"
        position, own = self.params.position, self.params.own
        return (position >= own.prompt_len[:, None]) & (position < own.seq_len[:, None]) & ~self.is_masked

    @property
    def scheduled(self) -> Tensor:
        """[num_canvases] int64, how many positions the request's `steps` give this step."""
        return scheduled_count(self.is_masked.sum(1), self.params)

    @property
    def num_steps(self) -> Tensor:
        """[num_canvases] int64, into how many steps the request's `steps` divide a block."""
        return (1.0 / self.params.counts).sum(0).round().long()

    @property
    def num_own(self) -> Tensor:
        """[num_canvases] int64, positions of the block that are no prompt."""
        return self.canvas.shape[1] - self.params.num_known

    @property
    def num_blocks(self) -> Tensor:
        """[num_canvases] int64, of the request's generation."""
        own, length = self.params.own, self.canvas.shape[1]
        assert own is not None, "these canvases have such a policy"
        return (own.seq_len - own.prompt_len + length - 1) // length

    @property
    def uniform(self) -> Tensor:
        """[num_canvases, B], a number in (0, 1) of each position and step, the same whenever it is asked for."""
        keys = noise.stream_keys(self.params.seed[:, None], self.params.position, self.step[:, None])
        return noise.uniform(keys, noise.STREAM)

    def highest(self, score: Tensor, count: Tensor) -> Tensor:
        """Return the open positions of the highest scores, lowest position first among equals.

        Args:
            score: [num_canvases, B].
            count: [num_canvases] int64, how many.

        Returns: [num_canvases, B] bool.
        """
        return highest(score, count, self.is_open)

    def unmask(self, chosen: Tensor) -> Tensor:
        """Return the canvases where positions [num_canvases, B] bool have their tokens."""
        return torch.where(chosen, self.token_ids, self.canvas)


@dataclass(frozen=True, slots=True)
class Decision:
    """What a policy makes of canvases."""

    canvas: Tensor  # [num_canvases, B] int64, the next ones
    state: PolicyState = field(default_factory=dict)  # behind them; fields that are left out stay as they were
    # [num_canvases] bool, of the blocks without masks, those that are finished where tokens may change; None: all.
    is_done: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Unwritten:
    """What a policy asks that may write any token, also the mask token: `PartialStats.others`.

    Attributes:
        field: of its state, [num_canvases, B, width] ids that each position took, none twice, -1 for none.
        knows: tells of canvases [num_canvases, B] and the state whether the policy decides them without the likeliest
            token that was not written, which is known of a step's roots alone; [num_canvases] bool. A draft where it
            does not is the next step's root.
    """

    field: str
    knows: Callable[[Tensor, PolicyState], Tensor]


@dataclass(frozen=True, slots=True)
class TorchPolicy:
    """A policy that is torch code.

    Attributes:
        decide: the next canvases, of what the present ones show and what was kept of their blocks. It must not change
            what it is given, wait for the device, or look at one canvas for another. One that comes with us is also
            called for canvases of which nobody reads what it makes: finished ones, and those that it has decided.
        source: where the rule is published.
        parameters: numbers that it takes, by name; at most 8. The option of one is `<policy>_<parameter>`.
        takes: of `SHARED_OPTIONS`, those that it takes.
        state: what it keeps, by name.
        tokens_change: whether it may write other tokens than `Seen.token_ids`, change known ones or mask them again.
            Where not, a step unmasks open positions alone, one at least: the surest one if it chooses none.
        ends_itself: whether its blocks end by its rule, so that nothing has to bound them; of one that comes with us.
        asks_known: whether it looks at `Seen.known_probability`.
        asks_ends: whether it looks at `Seen.confidence_without`, in place of that.
        unwritten: what it asks besides, of one that comes with us; None: nothing.
        weights: the tensors of the net that it looks at, by the block length; their file is the server's setting
            `<policy>_file`. None: it has no net.
        file_of: the policy whose file that is; empty: it has one of its own.
    """

    decide: Callable[[Seen, PolicyState], Decision]
    source: str = ""
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    takes: tuple[str, ...] = ()
    state: Mapping[str, StateField] = field(default_factory=dict)
    tokens_change: bool = False
    ends_itself: bool = False
    asks_known: bool = False
    asks_ends: bool = False
    unwritten: Unwritten | None = None
    weights: Callable[[int], Mapping[str, tuple[int, ...]]] | None = None
    file_of: str = ""

    def __post_init__(self) -> None:
        """Raise ValueError for a declaration that cannot work."""
        if unknown := set(self.takes) - {*SHARED_OPTIONS}:
            raise ValueError(f"takes has {sorted(unknown)}, allowed are {SHARED_OPTIONS}; declare others as parameters")
        if len(self.parameters) > MAX_PARAMETERS:
            raise ValueError(f"parameters has {len(self.parameters)}, allowed are at most {MAX_PARAMETERS}")
        if self.asks_known and self.asks_ends:
            raise ValueError("asks_known and asks_ends are true, allowed is one of them; leave one out")
        if STEP in self.state:
            raise ValueError(f"state has {STEP!r}, which is kept of every block; read Seen.step, or take another name")

    @property
    def fields(self) -> dict[str, StateField]:
        """What is kept of it."""
        return {STEP: StateField(1, torch.int64, 0, "block"), **self.state}

    def new_state(self, num_canvases: int, block_length: int, device: torch.device) -> PolicyState:
        """Return what is kept of blocks of new requests."""
        return {name: its.new(num_canvases, block_length, device) for name, its in self.fields.items()}

    def of_next_block(self, state: PolicyState) -> PolicyState:
        """Return what is kept of the blocks behind those of a state, when they begin."""
        fields = self.fields
        return {
            name: its if fields[name].per == "request" else torch.full_like(its, fields[name].empty)
            for name, its in state.items()
        }


class PolicyFault(Exception):
    """A policy of a user made something of canvases that cannot be.

    Attributes:
        of: [num_canvases] bool on the host, of which; None: of all together.
    """

    def __init__(self, message: str, of: Tensor | None = None) -> None:
        super().__init__(message)
        self.of = of


def highest(score: Tensor, count: Tensor, among: Tensor) -> Tensor:
    """Return `count` positions of the highest scores among some, lowest position first among equals.

    Args:
        score: [num_canvases, B] float.
        count: [num_canvases] int64.
        among: [num_canvases, B] bool.

    Returns: [num_canvases, B] bool.
    """
    order = torch.sort(score.masked_fill(~among, -torch.inf), dim=1, descending=True, stable=True).indices
    # Scores may be -inf themselves.
    order = order.gather(1, torch.sort((~among).byte().gather(1, order), dim=1, stable=True).indices)
    rank = torch.arange(score.shape[1], device=score.device).expand_as(order)
    return torch.zeros_like(among).scatter_(1, order, rank < count[:, None]) & among


def decide(policy: TorchPolicy, seen: Seen, state: PolicyState, vocab_size: int | None = None) -> Decision:
    """Decide canvases, within what the policy declares.

    Args:
        policy: of all canvases.
        seen: of them.
        state: kept of them; with `STEP`.
        vocab_size: of a policy whose decisions are checked, which waits for the device; None: they are not.

    Raises: PolicyFault.
    """
    made = policy.decide(seen, {name: its for name, its in state.items() if name != STEP})
    if vocab_size is not None:
        _check(policy, seen, made, state, vocab_size)
    is_free = seen.step < CHANGING_STEPS * seen.canvas.shape[1] if policy.tokens_change else seen.step < 0
    if policy.ends_itself:
        is_free = torch.ones_like(is_free)
    canvas = _within(seen, made.canvas, is_free)
    is_done = (canvas != seen.mask_token_id).all(1)
    if made.is_done is not None:
        is_done &= made.is_done | ~is_free
    return Decision(canvas, {**state, **made.state, STEP: state[STEP] + 1}, is_done)


def _within(seen: Seen, canvas: Tensor, is_free: Tensor) -> Tensor:
    """Return the next canvases as far as a policy may make them so: a step that is not free unmasks at least one."""
    may_change = seen.is_open | (seen.is_written & is_free[:, None])
    canvas = torch.where(may_change, canvas, seen.canvas)
    goes_on = (seen.is_open & (canvas != seen.mask_token_id)).any(1)
    surest = seen.highest(seen.confidence, torch.ones_like(seen.step)) & ~(goes_on | is_free)[:, None]
    return torch.where(surest, seen.token_ids, canvas)


def _check(policy: TorchPolicy, seen: Seen, made: Decision, state: PolicyState, vocab_size: int) -> None:
    """Check what a user's policy returned. Raises: PolicyFault."""
    if not isinstance(made, Decision):
        raise PolicyFault(f"it returned a {type(made).__name__}, allowed is a Decision")
    _check_tensor("canvas", made.canvas, seen.canvas)
    if made.is_done is not None:
        _check_tensor("is_done", made.is_done, seen.is_open[:, 0])
    if unknown := made.state.keys() - (state.keys() - {STEP}):
        raise PolicyFault(f"its decision keeps {sorted(unknown)}, which its state does not declare")
    for name, its in made.state.items():
        _check_tensor(f"state[{name!r}]", its, state[name])
    is_known = made.canvas != seen.mask_token_id
    is_token = (made.canvas >= 0) & (made.canvas < vocab_size)
    wrong = {"tokens that the vocabulary has not": (is_known & ~is_token).any(1)}
    if not policy.tokens_change:
        changed = made.canvas != seen.canvas
        wrong["another token at a known position, without tokens_change"] = (changed & ~seen.is_masked).any(1)
        wrong["another token than token_ids, without tokens_change"] = (
            changed & seen.is_masked & (made.canvas != seen.token_ids)
        ).any(1)
    for name, its in made.state.items():
        if its.is_floating_point():
            wrong[f"NaN in state[{name!r}]"] = its.isnan().flatten(1).any(1)
    found = torch.stack(list(wrong.values())).cpu()
    for what, of in zip(wrong, found, strict=True):
        if of.any():
            raise PolicyFault(f"its decision has {what}", of)


def _check_tensor(name: str, its: object, like: Tensor) -> None:
    if not isinstance(its, Tensor):
        raise PolicyFault(f"its decision's {name} is a {type(its).__name__}, allowed are tensors")
    if its.shape != like.shape or its.dtype != like.dtype or its.device != like.device:
        raise PolicyFault(
            f"its decision's {name} is {list(its.shape)} {its.dtype} on {its.device}, allowed is {list(like.shape)} "
            f"{like.dtype} on {like.device}"
        )
