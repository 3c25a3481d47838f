"""What the policies need of the logits: the chosen token of a row and its probability, and nothing of size vocabulary.

The head product is made in chunks of rows (`chunk_rows`), each reduced at once by `row_stats`, so that logits of all
rows of a step never exist together.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_dllm.noise import uniform_rows

Uniform = Callable[[Tensor, int, int], Tensor]
"""`noise.uniform_rows` or a faster equal: (keys, first_id, num_ids) -> [num_rows, num_ids] float64."""

CHUNK_BYTES = 128 << 20
"""Bound of the largest temporary of a chunk, float64 of `[chunk_rows, vocab_size]`: some 130 rows at LLaDA-8B's
126,464 entries, where the head product of a chunk already costs more in arithmetic than in reading the weights."""


@dataclass(frozen=True, slots=True)
class RowSampling:
    """How each row's token is drawn, as device tensors; `has_*` are known to the host and spare whole stages."""

    temperature: Tensor  # [num_rows] float64, 0 takes the most probable token
    top_k: Tensor  # [num_rows] int64, 0 keeps all
    top_p: Tensor  # [num_rows] float64, 1 keeps all
    keys: Tensor  # [num_rows] int64, noise.stream_keys
    has_noise: bool  # any temperature > 0
    has_filter: bool  # any top_k or top_p that removes something at a temperature > 0

    def rows(self, begin: int, end: int) -> "RowSampling":
        """Return the parameters of rows [begin, end)."""
        return RowSampling(
            temperature=self.temperature[begin:end],
            top_k=self.top_k[begin:end],
            top_p=self.top_p[begin:end],
            keys=self.keys[begin:end],
            has_noise=self.has_noise,
            has_filter=self.has_filter,
        )


@dataclass(frozen=True, slots=True)
class RowStats:
    """What a row of logits says."""

    token_ids: Tensor  # [num_rows] int64, the chosen token
    confidence: Tensor  # [num_rows] float64, its probability, neither tempered nor filtered


@dataclass(frozen=True, slots=True)
class Candidates:
    """The most probable tokens of some rows, most probable first."""

    token_ids: Tensor  # [..., num_candidates] int64
    log_probs: Tensor  # [..., num_candidates] float64, neither tempered nor filtered


def chunk_rows(vocab_size: int) -> int:
    """Return how many rows of logits are reduced at a time."""
    return max(1, CHUNK_BYTES // (8 * vocab_size))


def row_stats(logits: Tensor, params: RowSampling, forbidden_id: int, draw_uniform: Uniform = uniform_rows) -> RowStats:
    """Choose each row's token by Gumbel-max and take its probability.

    Equal scores go to the lowest id. The confidence is `exp(l - l_max) / (1 + rest)`, where `rest` sums the
    exponentials of all entries but the largest: so 1 - confidence keeps its relative precision however close to 1 the
    confidence is, and no two different rows tie at 1.0 as they do in a plain float32 softmax.

    Args:
        logits: [num_rows, vocab_size] any float dtype; overwritten.
        params: the rows' sampling parameters.
        forbidden_id: an id that is never chosen and has probability 0 (the mask token).
        draw_uniform: where the noise comes from.
    """
    logits = logits.float()
    logits[:, forbidden_id] = -torch.inf
    largest, argmax = logits.max(dim=1)
    token_ids = _draw(logits, params, argmax, draw_uniform) if params.has_noise else argmax
    below = largest - logits.gather(1, token_ids[:, None]).squeeze(1)
    rest = logits.sub_(largest[:, None]).exp_().scatter_(1, argmax[:, None], 0.0).sum(1)
    return RowStats(token_ids, torch.exp(-below.double()) / (1.0 + rest.double()))


def top_candidates(logits: Tensor, num_candidates: int, forbidden_id: int) -> Candidates:
    """Take the most probable tokens of each row; the order of equal ones is open.

    Args:
        logits: [num_rows, vocab_size] any float dtype; overwritten.
        num_candidates: how many, at most `vocab_size`.
        forbidden_id: an id that has probability 0 (the mask token).
    """
    logits = logits.float()
    logits[:, forbidden_id] = -torch.inf
    top, token_ids = logits.topk(num_candidates, dim=1)
    largest = top[:, :1]
    rest = logits.sub_(largest).exp_().scatter_(1, token_ids[:, :1], 0.0).sum(1, keepdim=True)
    return Candidates(token_ids, (top - largest).double() - torch.log1p(rest.double()))


def _draw(logits: Tensor, params: RowSampling, argmax: Tensor, draw_uniform: Uniform) -> Tensor:
    """Take the argmax of `logits + T * gumbel` within the kept ids; [num_rows] int64."""
    scores = draw_uniform(params.keys, 0, logits.shape[1]).log_().neg_().log_().neg_()
    scores.mul_(params.temperature[:, None]).add_(logits)
    if params.has_filter:
        scores.masked_fill_(~kept_ids(logits, params), -torch.inf)
    return torch.where(params.temperature > 0, scores.argmax(dim=1), argmax)


def kept_ids(logits: Tensor, params: RowSampling) -> Tensor:
    """Tell which ids top_k and top_p leave of the tempered distribution.

    top_k keeps every value that is at least the k-th largest; top_p, of these, the smallest set of most probable ids
    whose probability reaches top_p, lowest id first among equals, and at least one.

    Args:
        logits: [num_rows, vocab_size] float32.
        params: the rows' sampling parameters; rows at temperature 0 are filtered as at 1 (their result is not used).

    Returns: [num_rows, vocab_size] bool.
    """
    temperature = torch.where(params.temperature > 0, params.temperature, 1.0)
    ordered, order = torch.sort(logits, dim=1, descending=True, stable=True)
    top_k = torch.where(params.top_k > 0, params.top_k, logits.shape[1]).clamp(max=logits.shape[1])
    kth = ordered.gather(1, top_k[:, None] - 1)
    tempered = (ordered.double() / temperature[:, None]).masked_fill(ordered < kth, -torch.inf)
    probs = torch.softmax(tempered, dim=1)
    before = probs.cumsum(1) - probs
    keep = (ordered >= kth) & ((before < params.top_p[:, None]) | (params.top_p[:, None] >= 1.0))
    keep[:, 0] = True
    return torch.zeros_like(keep).scatter_(1, order, keep)
