"""CreditDecoding (arXiv:2510.06133), as dInfer's `CreditThresholdParallelDecoder` has it.

A masked position gives credit to tokens. Each step all its credit decays by `beta`, then the token that is the most
probable by itself gains its probability to the power `gamma`; logits are raised by `alpha * log(1 + credit)`. What is
drawn, and how sure it is, is of the raised logits; positions are chosen as by `threshold`.

Ours: a position credits at most `MAX_CREDITED` tokens; one more takes the place of that with the least credit. The
published code has a matrix over the vocabulary.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vllm_dllm import noise
from vllm_dllm.ops.vocab_stats import Distribution
from vllm_dllm.unmask.memory import Memory, PolicyState, Recalled, Shown, StateField

if TYPE_CHECKING:
    from vllm_dllm.unmask.policy import PolicyParams

MAX_CREDITED = 8
"""As many ids as the head gives logits of."""

_FIELDS = {
    "credit_ids": StateField(MAX_CREDITED, torch.int64, -1),  # -1: none
    "credits": StateField(MAX_CREDITED, torch.float64, 0.0),
}


def _credited(shown: Shown, params: "PolicyParams", state: PolicyState) -> PolicyState:
    """Let credits decay and give the most probable tokens theirs, where positions may be unmasked."""
    ids, credit = state["credit_ids"], state["credits"] * params.credit_beta[:, None, None]
    best = shown.rows.top_ids[:, 0].view(*shown.is_masked.shape, 1)
    probability = (1.0 / (1.0 + shown.rows.rest)).view_as(best)
    # Its own place, else the first that is free, else that of the least credit.
    order = torch.where(ids == best, -2.0, torch.where(ids < 0, -1.0, credit))
    is_place = torch.arange(MAX_CREDITED, device=ids.device) == order.argmin(2, keepdim=True)
    before = torch.where(is_place & (ids != best), 0.0, credit)
    gain = is_place * probability ** params.credit_gamma[:, None, None]
    is_open = shown.is_open[..., None]
    return {
        "credit_ids": torch.where(is_open & is_place, best, ids),
        "credits": torch.where(is_open, before + gain, state["credits"]),
    }


def _find(shown: Shown, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits of credited ids, and which the rows have; [num_canvases, block_length, MAX_CREDITED] each."""
    assert shown.rows.given_logits is not None, "the head was asked"
    shape = (*shown.is_masked.shape, 1, -1)
    listed_ids = torch.cat([shown.given_ids.view(shape), shown.rows.top_ids.view(shape)], -1)
    listed = torch.cat([shown.rows.given_logits.view(shape), shown.rows.top_logits.view(shape)], -1).double()
    is_it = (ids[..., None] == listed_ids) & (ids[..., None] >= 0)
    return torch.where(is_it, listed, -torch.inf).amax(-1), is_it.any(-1)


def _knows(shown: Shown, state: PolicyState) -> Tensor:
    _, is_found = _find(shown, state["credit_ids"])
    return (is_found | (state["credit_ids"] < 0)).all(2).logical_or(~shown.is_open).all(1)


@dataclass(frozen=True, slots=True)
class _Raised:
    """Logits of the ids that have credit: [num_canvases, block_length, MAX_CREDITED] each."""

    ids: Tensor  # int64, -1: none
    own: Tensor  # float64, -inf: none
    raised: Tensor  # float64


def _draw(shown: Shown, params: "PolicyParams", credited: _Raised) -> tuple[Tensor, Tensor]:
    """Draw each position's token; returns ids and raised logits, [num_canvases, block_length, 1] each.

    What is drawn without credit has the best score of the ids that have none. Of equal scores the lowest id wins.
    """
    shape = (*shown.is_masked.shape, 1)
    drawn, drawn_logit = shown.rows.token_ids.view(shape), shown.rows.token_logits.double().view(shape)
    num_masked = shown.is_masked.sum(1, keepdim=True)
    keys = noise.stream_keys(params.seed[:, None], params.position, num_masked)[..., None]
    temperature = params.temperature[:, None, None]

    def score(logits: Tensor, ids: Tensor) -> Tensor:
        return logits + torch.where(temperature > 0, temperature * noise.gumbel(keys, ids), 0.0)

    scores, drawn_score = score(credited.raised, credited.ids), score(drawn_logit, drawn)
    best = scores.amax(2, keepdim=True)
    best_id = torch.where(scores == best, credited.ids, torch.iinfo(torch.int64).max).amin(2, keepdim=True)
    is_best = (best > drawn_score) | ((best == drawn_score) & (best_id < drawn))
    raised = torch.where(credited.ids == best_id, credited.raised, -torch.inf).amax(2, keepdim=True)
    return torch.where(is_best, best_id, drawn), torch.where(is_best, raised, drawn_logit)


def _distribution(shown: Shown, params: "PolicyParams", credited: _Raised, token_raised: Tensor) -> Distribution:
    """Return the distribution of the raised logits, relative to the largest, so that no exponential overflows."""
    rows, shape = shown.rows, (*shown.is_masked.shape, 1)
    temperature = params.temperature[:, None, None]
    divisor = torch.where(temperature > 0, temperature, 1.0).expand(shape)
    own = rows.distribution(divisor.flatten())
    if rows.sampled_rest is None:
        divisor = torch.ones_like(divisor)
    top = credited.raised.amax(2, keepdim=True)
    mass = ((rows.top_logits[:, 0].double().view(shape) - top) / divisor).exp() * (1.0 + own.rest.view(shape))
    gained = ((credited.raised - top) / divisor).exp() - ((credited.own - top) / divisor).exp()
    rest = mass + gained.sum(2, keepdim=True) - 1.0
    return replace(own, rest=rest.flatten(), token=((token_raised - top) / divisor).flatten())


def _recall(shown: Shown, params: "PolicyParams", state: PolicyState) -> Recalled:
    state = _credited(shown, params, state)
    ids = state["credit_ids"]
    own, _ = _find(shown, ids)
    credited = _Raised(ids, own, own + params.credit_alpha[:, None, None] * state["credits"].log1p())
    token_ids, token_raised = _draw(shown, params, credited)
    return Recalled(token_ids.flatten(), _distribution(shown, params, credited, token_raised), state)


CREDIT = Memory(_FIELDS, "credit_ids", _knows, _recall)
