"""Where the statistics of a step's rows come from: the head product and its reduction, in one place.

Logits of all rows of a step never exist together. `WeightHead` multiplies and reduces in one op; `LogitsHead` makes
logits of some rows at a time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from vllm_dllm.ops.vocab_stats import PartialStats, RowIds, RowSampling, merge, vocab_stats
from vllm_dllm.unmask.stats import torch_stats

LOGITS_BYTES = 128 << 20
"""Bound of the largest temporary of `torch_stats`, float64 of `[chunk_rows, vocab_size]`: some 130 rows at LLaDA-8B's
126,464 entries, where the head product of a chunk already costs more in arithmetic than in reading the weights."""

WEIGHT_ROWS = 1024
"""Rows of a call of the op with a weight: its scratch is some 3 % of the logits."""


class Head(Protocol):
    """Reduces hidden rows to what the policies and the drafts need of their logits."""

    @property
    def chunk_rows(self) -> int:
        """Rows of a call beyond which the memory in use does not grow."""

    def __call__(
        self, hidden: Tensor, sampling: RowSampling | None, num_candidates: int, ids: RowIds | None = None
    ) -> PartialStats:
        """Return statistics of the whole vocabulary.

        Args:
            hidden: [num_rows, hidden_size].
            sampling: of the rows; None: all take their argmax.
            num_candidates: 1 to 8.
            ids: of the rows; None: they ask for none and may take all.
        """


@dataclass(frozen=True, slots=True)
class Shard:
    """A rank's part of a head without bias, scale or quantisation."""

    weight: Tensor  # [num_ids, hidden_size]
    first_id: int
    num_shards: int
    gather: Callable[[Tensor], Tensor]  # [num_rows, n] float64 -> [num_rows, num_shards * n], in the order of ids


class LogitsHead:
    """Statistics of logits, natively or by torch.

    Args:
        head_logits: maps hidden rows to logits [num_rows, vocab_size], which may be overwritten.
        vocab_size: ids of a row.
        mask_token_id: the id that is never chosen.
        is_native: by the op.
    """

    def __init__(
        self, head_logits: Callable[[Tensor], Tensor], vocab_size: int, mask_token_id: int, *, is_native: bool
    ) -> None:
        self.head_logits = head_logits
        self.chunk_rows = max(1, LOGITS_BYTES // (8 * vocab_size))
        reduce = partial(vocab_stats, weight=None) if is_native else torch_stats
        self._reduce = partial(reduce, excluded_ids=[mask_token_id])

    def __call__(
        self, hidden: Tensor, sampling: RowSampling | None, num_candidates: int, ids: RowIds | None = None
    ) -> PartialStats:
        """Implement `Head`."""

        def reduce(rows: Tensor, sampling: RowSampling | None, ids: RowIds | None) -> PartialStats:
            logits = self.head_logits(rows)
            return self._reduce(logits, sampling=sampling, num_candidates=num_candidates, ids=ids)

        return _in_chunks(hidden, sampling, ids, self.chunk_rows, reduce)


class WeightHead:
    """Statistics by one op of hidden rows and the head's weight, merged over the shards of the vocabulary.

    top_k and top_p need a row's whole vocabulary: with several shards, rows that they filter take `by_logits`.

    Args:
        shard: this rank's part.
        by_logits: the same head.
        mask_token_id: the id that is never chosen.
    """

    chunk_rows = WEIGHT_ROWS

    def __init__(self, shard: Shard, by_logits: LogitsHead, mask_token_id: int) -> None:
        self._shard = shard
        self._by_logits = by_logits
        self._mask_token_id = mask_token_id

    def __call__(
        self, hidden: Tensor, sampling: RowSampling | None, num_candidates: int, ids: RowIds | None = None
    ) -> PartialStats:
        """Implement `Head`."""
        if self._shard.num_shards == 1:
            return self._own(hidden, sampling, num_candidates, ids)
        unfiltered = sampling and sampling.without_filter()
        own = self._own(hidden, unfiltered, num_candidates, ids)
        gathered = self._shard.gather(_pack(own)).chunk(self._shard.num_shards, 1)
        stats = merge([_unpack(packed, own) for packed in gathered], unfiltered)
        if sampling is None or not sampling.has_filter:
            return stats
        whole = self._by_logits(hidden, sampling, num_candidates, ids)
        return PartialStats.of(partial(_select, sampling.is_filtered()), whole, stats)

    def _own(
        self, hidden: Tensor, sampling: RowSampling | None, num_candidates: int, ids: RowIds | None
    ) -> PartialStats:
        """Return the statistics of this rank's ids."""
        reduce = partial(
            vocab_stats,
            weight=self._shard.weight,
            first_id=self._shard.first_id,
            excluded_ids=[self._mask_token_id],
            num_candidates=num_candidates,
        )
        return _in_chunks(
            hidden, sampling, ids, self.chunk_rows, lambda rows, own, its: reduce(rows, sampling=own, ids=its)
        )


def _in_chunks(
    hidden: Tensor,
    sampling: RowSampling | None,
    ids: RowIds | None,
    chunk_rows: int,
    reduce: Callable[[Tensor, RowSampling | None, RowIds | None], PartialStats],
) -> PartialStats:
    if len(hidden) <= chunk_rows:
        return reduce(hidden, sampling, ids)
    parts = []
    for begin in range(0, len(hidden), chunk_rows):
        end = min(begin + chunk_rows, len(hidden))
        parts.append(reduce(hidden[begin:end], sampling and sampling.rows(begin, end), ids and ids.rows(begin, end)))
    return PartialStats.of(lambda *columns: torch.cat(columns), *parts)


def _pack(stats: PartialStats) -> Tensor:
    """Put statistics into one tensor [num_rows, n] of float64, which holds ids and float32 exactly."""
    return torch.cat([column.double().view(len(column), -1) for column in stats.tensors], 1)


def _unpack(packed: Tensor, like: PartialStats) -> PartialStats:
    parts = iter(packed.split([column.numel() // len(column) for column in like.tensors], 1))
    return PartialStats.of(lambda column: next(parts).reshape(column.shape).to(column.dtype), like)


def _select(where: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    return torch.where(where if yes.dim() == 1 else where[:, None], yes, no)
