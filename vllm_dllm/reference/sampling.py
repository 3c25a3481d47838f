"""How a step of the reference decoders chooses the token of a position.

Noise is a function of what it is drawn for (`vllm_dllm.noise`) where the published decoders draw it from torch's global
generator, so that an engine can draw the same.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_dllm.noise import gumbel
from vllm_dllm.reference.edits import Edits

_NO_EDITS = Edits()


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a step chooses the token of a position."""

    temperature: float = 0.0
    cfg_scale: float = 0.0  # LLaDA: classifier-free guidance against the sequence with its prompt masked
    logits_eos_inf: bool = False  # LLaDA app. B.4
    seed: int = 0
    # Filters of softmax(logits / temperature), none at temperature 0: first top_k, then top_p of what is left, as SDAR
    # has it; Dream publishes `top_p_first`. LLaDA has none (ours).
    top_k: int | None = None
    top_p: float | None = None
    top_p_first: bool = False
    min_p: float = 0.0  # ours: the first filter; drops what is less probable than this share of the most probable token
    forbidden_ids: tuple[int, ...] = ()  # ours: tokens that may never be chosen; an engine lists the mask token
    edits: Edits = _NO_EDITS  # ours: of the logits, before all else


def kept_tokens(logits: Tensor, sampling: Sampling) -> Tensor:
    """Say which tokens min_p, top_k and top_p leave of softmax(logits / temperature); [num_positions, vocab] bool.

    top_k keeps every value that equals the k-th largest. top_p keeps the fewest tokens, most probable first and
    lowest id first among equals, whose mass reaches top_p.
    """
    scaled = logits.double() / sampling.temperature
    if sampling.min_p:
        is_outside = scaled - scaled.amax(-1, keepdim=True) < math.log(sampling.min_p)
        scaled = scaled.masked_fill(is_outside, -torch.inf)
    filters = [_keep_top_k, _keep_top_p]
    for keep in reversed(filters) if sampling.top_p_first else filters:
        scaled = keep(scaled, sampling)
    return scaled > -torch.inf


def _keep_top_k(scaled: Tensor, sampling: Sampling) -> Tensor:
    if sampling.top_k is None or sampling.top_k >= scaled.shape[-1]:
        return scaled
    smallest_kept = scaled.topk(sampling.top_k).values[:, -1:]
    return scaled.masked_fill(scaled < smallest_kept, -torch.inf)


def _keep_top_p(scaled: Tensor, sampling: Sampling) -> Tensor:
    if sampling.top_p is None:
        return scaled
    probs, ids = scaled.softmax(-1).sort(descending=True, stable=True)
    mass_before = probs.cumsum(-1) - probs
    is_outside = torch.zeros_like(scaled, dtype=torch.bool).scatter(-1, ids, mass_before >= sampling.top_p)
    is_outside.scatter_(-1, ids[:, :1], value=False)
    return scaled.masked_fill(is_outside, -torch.inf)


def choose_tokens(logits: Tensor, keys: Tensor, sampling: Sampling) -> Tensor:
    """Choose a token per position: the first maximum of logits + temperature * Gumbel noise, in float64.

    LLaDA's published score exp(logits) / (-ln u)^temperature has the same maximum; the others draw from the softmax,
    which is the same distribution.

    Args:
        logits: [num_positions, vocab].
        keys: [num_positions] int64, noise streams.

    Returns: [num_positions] int64.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    noise = gumbel(keys[:, None], torch.arange(logits.shape[-1], device=logits.device))
    scores = logits.double() + sampling.temperature * noise
    return scores.masked_fill(~kept_tokens(logits, sampling), -torch.inf).argmax(-1)


def sampled_logits(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return the logits whose softmax the tokens are drawn from; those of temperature 0 are the model's own.

    Args:
        logits: [num_positions, vocab].

    Returns: the same shape and dtype, -inf outside top_k and top_p.
    """
    if sampling.temperature == 0:
        return logits
    return (logits / sampling.temperature).masked_fill(~kept_tokens(logits, sampling), -torch.inf)


def remove_tokens(logits: Tensor, ids: tuple[int, ...]) -> Tensor:
    """Return logits [..., vocab] with those of the given ids at -inf."""
    return logits.index_fill(-1, torch.tensor(ids, dtype=torch.int64, device=logits.device), -torch.inf)
