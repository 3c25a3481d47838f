"""What the policies and the drafts need of the logits, by torch: the twin of the op `vocab_stats` on logits."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from vllm_dllm.noise import gumbel
from vllm_dllm.ops.vocab_stats import PartialStats, RowIds, RowSampling


@dataclass(frozen=True, slots=True)
class Candidates:
    """The most probable tokens of some rows, most probable first."""

    token_ids: Tensor  # [..., num_candidates] int64
    log_probs: Tensor  # [..., num_candidates] float64, neither tempered nor filtered

    def of(self, index: Tensor | tuple[slice | int, ...]) -> "Candidates":
        """Return those at an index of the leading dimensions."""
        return Candidates(self.token_ids[index], self.log_probs[index])

    def view(self, *shape: int) -> "Candidates":
        """Return the same in another shape, without the last dimension."""
        return Candidates(self.token_ids.view(*shape, -1), self.log_probs.view(*shape, -1))


def candidates_of(stats: PartialStats) -> Candidates:
    """Take the candidates of rows; one that is missing is id 0 with probability 0."""
    return Candidates(stats.top_ids.clamp(min=0), stats.log_probs)


def torch_stats(
    logits: Tensor,
    *,
    excluded_ids: Sequence[int],
    num_candidates: int,
    sampling: RowSampling | None,
    ids: RowIds | None = None,
) -> PartialStats:
    """Reduce rows of logits as `ops.vocab_stats` does; of equal candidates the lowest id comes first.

    A row with a NaN draws it.

    Args:
        logits: [num_rows, vocab_size] any float dtype; overwritten.
        excluded_ids: ids whose logits count as -inf.
        num_candidates: how many of the largest logits to keep.
        sampling: of the rows; None: all take their argmax.
        ids: of the rows; logits of ids that are not allowed count as -inf.
    """
    logits = logits.float()
    logits[:, excluded_ids] = -torch.inf
    if ids is not None and ids.allowed is not None:
        logits.masked_fill_(~unpacked(ids.allowed, logits.shape[1]), -torch.inf)
    given_logits = None if ids is None or ids.given is None else _gather(logits, ids.given)
    largest, argmax = logits.max(dim=1)
    top_logits, top_ids = _largest(logits, num_candidates)
    scores, token_ids = largest.double(), argmax
    kept = None
    if sampling is not None:
        is_drawn = sampling.temperature > 0
        kept = kept_ids(logits, sampling) if sampling.has_filter or sampling.min_p is not None else None
        best, drawn = _scores(logits, sampling, kept).max(dim=1)
        scores, token_ids = torch.where(is_drawn, best, scores), torch.where(is_drawn, drawn, token_ids)
    token_logits = logits.gather(1, token_ids[:, None]).squeeze(1)
    below = logits.sub_(largest[:, None])
    sums = _sums(below, argmax)
    sampled: tuple[Tensor | None, Tensor | None] = (None, None)
    if sampling is not None and sampling.wants_sampled:
        tempered = _filtered(below.double().div_(sampling.divisor[:, None]), kept)
        rest, weighted = _sums(tempered, argmax)
        sampled = (torch.where(is_drawn, rest, sums[0]), torch.where(is_drawn, weighted, sums[1]))
    return PartialStats(top_ids, top_logits, *sums, token_ids, token_logits, scores, *sampled, given_logits)


def _largest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the largest logits of each row and their ids, of equal ones the lowest first; -inf and -1 if missing."""
    # `topk` leaves open which of equal ones it takes, and in which order.
    values = logits.topk(min(count, logits.shape[1]), dim=1).values
    left, ids = logits.clone(), torch.zeros_like(values, dtype=torch.int64)
    for place in range(ids.shape[1]):
        ids[:, place] = left.argmax(dim=1)
        left.scatter_(1, ids[:, place, None], -torch.inf)
    # Where all that is left counts as -inf, `argmax` named the same id again.
    ids.masked_fill_(values == -torch.inf, -1)
    missing = (0, count - ids.shape[1])
    return pad(values, missing, value=-torch.inf), pad(ids, missing, value=-1)


def _gather(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the logits of ids [num_rows, n]; -inf for those outside the vocabulary."""
    is_there = (ids >= 0) & (ids < logits.shape[1])
    return torch.where(is_there, logits.gather(1, torch.where(is_there, ids, 0)), -torch.inf)


def unpacked(words: Tensor, num_ids: int) -> Tensor:
    """Unpack bit sets [num_rows, num_words] int32 to [num_rows, num_ids] bool, the lowest bit first."""
    bits = words[:, :, None] >> torch.arange(32, device=words.device, dtype=torch.int32) & 1
    return bits.flatten(1)[:, :num_ids].bool()


def _sums(below: Tensor, argmax: Tensor) -> tuple[Tensor, Tensor]:
    """Return `rest` and `weighted` of [num_rows, vocab_size] distances from each row's largest logit."""
    mass = below.exp().scatter_(1, argmax[:, None], 0.0)
    weighted = (below * mass).masked_fill_(mass == 0, 0.0)
    return mass.sum(1).double(), weighted.sum(1).double()


def _scores(logits: Tensor, sampling: RowSampling, kept: Tensor | None) -> Tensor:
    """Add each row's noise to its logits, and -inf to the ids it filters; [num_rows, vocab_size] float64."""
    scores = gumbel(sampling.keys[:, None], torch.arange(logits.shape[1], device=logits.device))
    return _filtered(scores.mul_(sampling.temperature[:, None]).add_(logits), kept)


def _filtered(values: Tensor, kept: Tensor | None) -> Tensor:
    """Overwrite the values of ids that are not kept with -inf; None keeps all."""
    return values if kept is None else values.masked_fill_(~kept, -torch.inf)


def kept_ids(logits: Tensor, params: RowSampling) -> Tensor:
    """Tell which ids min_p, top_k and top_p leave of the tempered distribution.

    min_p keeps those at least so probable as this share of the most probable one; top_k every value that is at least
    the k-th largest; top_p, of these, the smallest set of most probable ids whose probability reaches top_p, lowest id
    first among equals, and at least one.

    Args:
        logits: [num_rows, vocab_size] float32.
        params: the rows' sampling parameters; rows at temperature 0 are filtered as at 1 (their result is not used).

    Returns: [num_rows, vocab_size] bool.
    """
    ordered, order = torch.sort(logits, dim=1, descending=True, stable=True)
    top_k = torch.where(params.top_k > 0, params.top_k, logits.shape[1]).clamp(max=logits.shape[1])
    kth = ordered.gather(1, top_k[:, None] - 1)
    tempered = ordered.double() / params.divisor[:, None]
    is_kept = ordered >= kth
    if params.min_p is not None:
        is_kept &= tempered - tempered[:, :1] >= params.min_p.log()[:, None]
    tempered.masked_fill_(~is_kept, -torch.inf)
    probs = torch.softmax(tempered, dim=1)
    before = probs.cumsum(1) - probs
    keep = is_kept & ((before < params.top_p[:, None]) | (params.top_p[:, None] >= 1.0))
    keep[:, 0] = True
    return torch.zeros_like(keep).scatter_(1, order, keep)
