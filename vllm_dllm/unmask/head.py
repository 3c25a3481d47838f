"""Where the statistics of a step's rows come from: the head product and its reduction, in one place.

Logits of all rows of a step never exist together. `WeightHead` multiplies and reduces in one op; `LogitsHead` makes
logits of some rows at a time. With several ranks each has a part of the vocabulary, and `MergedHead` puts their
statistics together, some 25 numbers of a row where its logits would be 100,000.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from vllm_dllm.ops.vocab_stats import PartialStats, RowIds, RowSampling, merge, vocab_stats
from vllm_dllm.unmask.guidance import wanted_logits
from vllm_dllm.unmask.stats import torch_stats

TORCH_BYTES = 128 << 20
"""Bound of the largest temporary of `torch_stats`, float64 of `[chunk_rows, vocab_size]`: some 130 rows at LLaDA-8B's
126,464 entries."""

NATIVE_ROWS = 1024
"""Rows of a call of the op, whole tiles of any GPU's matrix product. Each call reads all weights, which is hidden by
arithmetic from some 200 rows on. Float32 logits of as many are 0.5 GB at LLaDA-8B's vocabulary; the op's scratch
beside a weight is some 3 % of that."""


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


class LogitsHead:
    """Statistics of logits, natively or by torch.

    Args:
        head_logits: maps hidden rows to logits [num_rows, num_ids], which may be overwritten.
        num_ids: ids of a row.
        mask_token_id: the id that is never chosen; None: any may be.
        is_native: by the op.
        first_id: the id of the first logit; 0 without the op.
    """

    def __init__(
        self,
        head_logits: Callable[[Tensor], Tensor],
        num_ids: int,
        mask_token_id: int | None,
        *,
        is_native: bool,
        first_id: int = 0,
    ) -> None:
        self.head_logits, self.is_native = head_logits, is_native
        self.chunk_rows = NATIVE_ROWS if is_native else max(1, TORCH_BYTES // (8 * num_ids))
        self._reduce = partial(vocab_stats, weight=None, first_id=first_id) if is_native else torch_stats
        self._mask_token_id = mask_token_id

    def __call__(
        self, hidden: Tensor, sampling: RowSampling | None, num_candidates: int, ids: RowIds | None = None
    ) -> PartialStats:
        """Implement `Head`."""

        def reduce(rows: Tensor, sampling: RowSampling | None, ids: RowIds | None) -> PartialStats:
            logits = wanted_logits(self.head_logits, rows, ids)
            excluded = _excluded(self._mask_token_id, ids)
            return self._reduce(
                logits, excluded_ids=excluded, sampling=sampling, num_candidates=num_candidates, ids=ids
            )

        return _in_chunks(hidden, sampling, ids, self.chunk_rows, reduce)


class WeightHead:
    """Statistics by one op of hidden rows and the weight of a head without bias, scale or quantisation.

    Args:
        weight: [num_ids, hidden_size].
        mask_token_id: the id that is never chosen; None: any may be.
        first_id: the id of the first row.
    """

    def __init__(self, weight: Tensor, mask_token_id: int | None, first_id: int = 0) -> None:
        self.chunk_rows = NATIVE_ROWS
        self.weight = weight
        self._reduce = partial(vocab_stats, weight=weight, first_id=first_id)
        self._mask_token_id = mask_token_id

    def __call__(
        self, hidden: Tensor, sampling: RowSampling | None, num_candidates: int, ids: RowIds | None = None
    ) -> PartialStats:
        """Implement `Head`."""

        def reduce(rows: Tensor, sampling: RowSampling | None, ids: RowIds | None) -> PartialStats:
            excluded = _excluded(self._mask_token_id, ids)
            return self._reduce(rows, excluded_ids=excluded, num_candidates=num_candidates, sampling=sampling, ids=ids)

        return _in_chunks(hidden, sampling, ids, self.chunk_rows, reduce)


class MergedHead:
    """Statistics of a vocabulary of which each rank has a part.

    top_k and top_p need a row's whole vocabulary: rows that they filter take `whole`.

    Args:
        own: of this rank's ids.
        whole: of all.
        num_ranks: with parts.
        gather: [num_rows, n] float64 -> [num_rows, num_ranks * n], in the order of ids.
    """

    def __init__(self, own: Head, whole: Head, num_ranks: int, gather: Callable[[Tensor], Tensor]) -> None:
        self.own, self.whole = own, whole
        self._num_ranks, self._gather = num_ranks, gather

    @property
    def chunk_rows(self) -> int:
        """Implement `Head`."""
        return max(self.own.chunk_rows, self.whole.chunk_rows)

    def __call__(
        self, hidden: Tensor, sampling: RowSampling | None, num_candidates: int, ids: RowIds | None = None
    ) -> PartialStats:
        """Implement `Head`."""
        unfiltered = sampling and sampling.without_filter()
        own = self.own(hidden, unfiltered, num_candidates, ids)
        gathered = self._gather(_pack(own)).chunk(self._num_ranks, 1)
        stats = merge([_unpack(packed, own) for packed in gathered], unfiltered)
        if sampling is None or not sampling.has_filter:
            return stats
        whole = self.whole(hidden, sampling, num_candidates, ids)
        return PartialStats.of(partial(_select, sampling.is_filtered()), whole, stats)


class EditedHead:
    """Statistics of rows of which some are edited or guided: those take their logits.

    The others' are the same bits whoever is beside them. `min_p` is torch's alone.

    Args:
        own: of rows without edits.
        head_logits: maps hidden rows to logits of the whole vocabulary [num_rows, num_ids], which may be overwritten.
        num_ids: ids of a row.
        mask_token_id: the id that is never chosen.
        is_native: edited logits are reduced by the op.
    """

    def __init__(
        self,
        own: Head,
        head_logits: Callable[[Tensor], Tensor],
        num_ids: int,
        mask_token_id: int | None,
        *,
        is_native: bool,
    ) -> None:
        self.own = own
        self._whole = LogitsHead(head_logits, num_ids, mask_token_id, is_native=is_native)
        self._plain = LogitsHead(head_logits, num_ids, mask_token_id, is_native=False)

    @property
    def chunk_rows(self) -> int:
        """Implement `Head`."""
        return self.own.chunk_rows

    def __call__(
        self, hidden: Tensor, sampling: RowSampling | None, num_candidates: int, ids: RowIds | None = None
    ) -> PartialStats:
        """Implement `Head`."""
        if ids is None or (ids.edits is None and ids.guidance is None):
            return self.own(hidden, sampling, num_candidates, ids)
        edits, guidance = ids.edits, ids.guidance
        stats = self._whole(hidden, sampling, num_candidates, ids)
        if edits is not None and edits.min_p is not None and sampling is not None:
            plain = self._plain(hidden, replace(sampling, min_p=edits.min_p), num_candidates, ids)
            stats = PartialStats.of(partial(_select, edits.min_p > 0), plain, stats)
        if edits is not None and edits.covers_all:
            return stats
        changed = [*([] if edits is None else [edits.is_edited]), *([] if guidance is None else [guidance.scale > 0])]
        # Another head may have a part of the vocabulary alone, where the ids of edits mean nothing.
        own = self.own(hidden, sampling, num_candidates, replace(ids, edits=None, guidance=None))
        return PartialStats.of(partial(_select, changed[0] | changed[-1]), stats, own)


def _excluded(mask_token_id: int | None, ids: RowIds | None) -> list[int]:
    if mask_token_id is None or (ids is not None and ids.takes_mask):
        return []
    return [mask_token_id]


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
