"""What rows of logits say, from hidden rows and the LM head's weight, or from logits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vllm_dllm.ops.load import check_one_device, require

if TYPE_CHECKING:
    from vllm_dllm.unmask.edits import RowEdits
    from vllm_dllm.unmask.guidance import Guidance


@dataclass(frozen=True, slots=True)
class RowSampling:
    """How tokens of rows are drawn, of which some have a temperature above 0; `has_filter` spares a stage."""

    temperature: Tensor  # [num_rows] float64, 0 takes the most probable token
    top_k: Tensor  # [num_rows] int64, 0 keeps all
    top_p: Tensor  # [num_rows] float64, 1 keeps all
    keys: Tensor  # [num_rows] int64, noise.stream_keys
    has_filter: bool  # any top_k or top_p that removes something at a temperature > 0
    wants_sampled: bool = False  # statistics of the sampled distribution too: softmax(l / temperature), filtered
    # [num_rows] float64: ids less probable than this share of the most probable one are filtered first, by torch alone;
    # 0 keeps all. None: so do all rows.
    min_p: Tensor | None = None

    def rows(self, begin: int, end: int) -> "RowSampling":
        """Return the parameters of rows [begin, end)."""
        return self.of(slice(begin, end))

    def of(self, index: Tensor | slice) -> "RowSampling":
        """Return the parameters of some rows."""
        own = {name: getattr(self, name)[index] for name in ("temperature", "top_k", "top_p", "keys")}
        return replace(self, **own, min_p=None if self.min_p is None else self.min_p[index])

    @property
    def divisor(self) -> Tensor:
        """[num_rows] float64, what logits are divided by: the temperature, 1 where that is 0."""
        return torch.where(self.temperature > 0, self.temperature, 1.0)

    def without_filter(self) -> "RowSampling":
        """Return the same without top_k and top_p."""
        return replace(self, has_filter=False)

    def is_filtered(self) -> Tensor:
        """Tell whose token is drawn among what top_k or top_p leave; [num_rows] bool."""
        return (self.temperature > 0) & ((self.top_k > 0) | (self.top_p < 1))


@dataclass(frozen=True, slots=True)
class RowIds:
    """Which ids rows ask for, and may take."""

    given: Tensor | None = None  # [num_rows, num_given] int64, whose logits are wanted, at most 8; -1: none
    # [num_rows, num_words] int32, bit `id % 32` of word `id // 32` for each id of the vocabulary; None allows all.
    allowed: Tensor | None = None
    edits: "RowEdits | None" = None  # of logits, before anything else; not the op's (`unmask.head.EditedHead`)
    guidance: "Guidance | None" = None  # of logits, before edits; nor is it
    takes_mask: bool = False  # whether the ids that a head leaves out count as others do

    def rows(self, begin: int, end: int) -> "RowIds":
        """Return those of rows [begin, end)."""
        given, allowed = (None if ids is None else ids[begin:end] for ids in (self.given, self.allowed))
        guidance = self.guidance and self.guidance.of(slice(begin, end))
        return RowIds(given, allowed, self.edits and self.edits.rows(begin, end), guidance, self.takes_mask)

    def of(self, row: Tensor) -> "RowIds":
        """Return those of some rows, [n] int64."""
        given, allowed = (None if ids is None else ids[row] for ids in (self.given, self.allowed))
        edits, guidance = self.edits and self.edits.take(row), self.guidance and self.guidance.of(row)
        return RowIds(given, allowed, edits, guidance, self.takes_mask)


@dataclass(frozen=True, slots=True)
class Distribution:
    """What unmasking policies ask of each row's distribution over the vocabulary: that of probabilities ~ exp(x).

    Of the model's own distribution x is `l - largest`; of the sampled one it is that over the temperature, and the
    sums are over the ids that the filters keep.
    """

    rest: Tensor  # [num_rows] float64, sum of exp(x) over all ids but the first candidate, where x is 0
    weighted: Tensor  # [num_rows] float64, sum of x exp(x)
    token: Tensor  # [num_rows] float64, x of the drawn token
    candidates: Tensor  # [num_rows, num_candidates] float64, x of the largest; -inf: none

    def where(self, is_it: Tensor, other: "Distribution") -> "Distribution":
        """Return that of the rows that `is_it` [num_rows] bool marks, and of `other` for the rest."""
        return Distribution(
            torch.where(is_it, self.rest, other.rest),
            torch.where(is_it, self.weighted, other.weighted),
            torch.where(is_it, self.token, other.token),
            torch.where(is_it[:, None], self.candidates, other.candidates),
        )

    @property
    def confidence(self) -> Tensor:
        """[num_rows] float64, the probability of the drawn token."""
        return self.token.exp() / (1.0 + self.rest)

    @property
    def margin(self) -> Tensor:
        """[num_rows] float64, by how much the most probable id is above the second; needs two candidates."""
        return -torch.expm1(self.candidates[:, 1]) / (1.0 + self.rest)

    @property
    def entropy(self) -> Tensor:
        """[num_rows] float64 in nats."""
        return torch.log1p(self.rest) - self.weighted / (1.0 + self.rest)


@dataclass(frozen=True, slots=True)
class PartialStats:
    """What rows of logits say of some ids of the vocabulary; `merge` says the same of more ids together.

    With `l` a row's logits and `largest` the first of `top_logits`. The sums leave the largest out, so that
    1 - confidence keeps its relative precision however close to 1 the confidence is, and no two different rows tie at
    1.0 as they do in a plain float32 softmax.
    """

    top_ids: Tensor  # [num_rows, num_candidates] int64, largest logit first, lowest id first of equal ones, -1: none
    top_logits: Tensor  # [num_rows, num_candidates] float32, -inf: none
    rest: Tensor  # [num_rows] float64, sum of exp(l - largest) over all ids but the first candidate
    weighted: Tensor  # [num_rows] float64, sum of (l - largest) exp(l - largest)
    token_ids: Tensor  # [num_rows] int64, the drawn token
    token_logits: Tensor  # [num_rows] float32, its logit
    scores: Tensor  # [num_rows] float64, its logit with noise
    # The sums over the ids that the filters keep, of (l - largest) / temperature; those above at temperature 0.
    sampled_rest: Tensor | None = None  # [num_rows] float64; None: not wanted
    sampled_weighted: Tensor | None = None  # [num_rows] float64; None: not wanted
    # Of the given ids, in the bits of `top_logits`; -inf: excluded, not allowed, or of other ids than these.
    given_logits: Tensor | None = None  # [num_rows, num_given] float32; None: not wanted
    # [num_rows, 3] float64, `unwritten.other_tokens`, which no reduction makes; None: not wanted
    others: Tensor | None = None

    @classmethod
    def of(cls, call: Callable[..., Tensor], *parts: "PartialStats") -> "PartialStats":
        """Apply `call` to what the parts have in each field that they have."""
        columns: dict[str, list[Any]] = {
            field.name: [getattr(part, field.name) for part in parts] for field in fields(cls)
        }
        return cls(**{name: call(*column) for name, column in columns.items() if column[0] is not None})

    @property
    def tensors(self) -> list[Tensor]:
        """The fields that there are, in their order; all have one entry per row."""
        values = (getattr(self, field.name) for field in fields(self))
        return [value for value in values if value is not None]

    def split(self, sizes: list[int]) -> list["PartialStats"]:
        """Return the statistics of consecutive rows, so many each."""
        rows = [slice(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]
        return [PartialStats.of(itemgetter(own), self) for own in rows]

    def distribution(self, divisor: Tensor) -> Distribution:
        """Return the sampled distribution where that is wanted, else the model's own.

        Args:
            divisor: [num_rows] float64, that of the sampling that was given for these statistics.
        """
        relative = self.top_logits.double()
        token = self.token_logits.double() - relative[:, 0]
        relative = relative - relative[:, :1]
        if self.sampled_rest is None or self.sampled_weighted is None:
            return Distribution(self.rest, self.weighted, token, relative)
        relative = relative / divisor[:, None]
        # Filters keep the best ids, so the second is left if any is.
        relative[:, 1:].masked_fill_(self.sampled_rest[:, None] == 0, -torch.inf)
        return Distribution(self.sampled_rest, self.sampled_weighted, token / divisor, relative)

    @property
    def log_probs(self) -> Tensor:
        """[num_rows, num_candidates] float64 of the candidates, neither tempered nor filtered; -inf: none."""
        top = self.top_logits.double()
        return top - top[:, :1] - torch.log1p(self.rest)[:, None]


def merge(parts: Sequence[PartialStats], sampling: RowSampling | None) -> PartialStats:
    """Put the statistics of consecutive shards of a vocabulary together.

    Args:
        parts: of the same rows, in the order of their ids, which decides between equal logits and scores.
        sampling: of the rows, as it was given for these statistics; none is filtered.
    """
    stacked = PartialStats.of(lambda *columns: torch.stack(columns), *parts)
    top_ids, top_logits = stacked.top_ids, stacked.top_logits
    tops = top_logits[..., 0].double()
    largest, first = tops.max(0)
    below = (tops - largest).masked_fill(tops == -torch.inf, -torch.inf)  # [num_parts, num_rows]
    logits, order = top_logits.movedim(0, 1).flatten(1).sort(dim=1, descending=True, stable=True)
    num_candidates = top_ids.shape[2]
    drawn = stacked.scores.argmax(0, keepdim=True)
    sampled_sums: tuple[Tensor | None, Tensor | None] = (None, None)
    if sampling is not None and stacked.sampled_rest is not None and stacked.sampled_weighted is not None:
        sampled_sums = _merge_sums(first, below / sampling.divisor, stacked.sampled_rest, stacked.sampled_weighted)
    return PartialStats(
        top_ids.movedim(0, 1).flatten(1).gather(1, order[:, :num_candidates]),
        logits[:, :num_candidates].contiguous(),
        *_merge_sums(first, below, stacked.rest, stacked.weighted),
        stacked.token_ids.gather(0, drawn)[0],
        stacked.token_logits.gather(0, drawn)[0],
        stacked.scores.gather(0, drawn)[0],
        *sampled_sums,
        None if stacked.given_logits is None else stacked.given_logits.amax(0),  # one part has the id
    )


def _merge_sums(first: Tensor, below: Tensor, rest: Tensor, weighted: Tensor) -> tuple[Tensor, Tensor]:
    """Rescale each part's sums to the largest of all.

    Args:
        first: [num_rows] int64, the part with the first candidate.
        below: [num_parts, num_rows] float64, how far each part's first candidate is below that; -inf: it has none.
        rest: [num_parts, num_rows] float64, as weighted.
        weighted: of the parts.
    """
    is_first = first == torch.arange(len(below), device=first.device)[:, None]
    scale = below.exp()
    mass = scale * (1.0 + rest)
    shifted = scale * weighted + torch.where(mass == 0, mass, below * mass)
    return torch.where(is_first, rest, mass).sum(0), shifted.sum(0)


def vocab_stats(
    rows: Tensor,
    weight: Tensor | None,
    *,
    first_id: int = 0,
    excluded_ids: Sequence[int],
    num_candidates: int,
    sampling: RowSampling | None,
    ids: RowIds | None = None,
) -> PartialStats:
    """Reduce the logits of each row, which never exist together.

    The token of a row is the argmax of `l + temperature * gumbel` in float64, within what top_k and top_p keep, with
    the noise of `noise.gumbel`; at temperature 0, and without sampling, the argmax of `l`. A logit of -inf is no
    candidate; NaN is none either, but makes the sums NaN. A row without candidates draws `first_id`.

    Args:
        rows: [num_rows, hidden_size] float32, float16 or bfloat16, or logits [num_rows, num_ids]; last dim contiguous.
        weight: [num_ids, hidden_size] of the dtype of rows, last dim contiguous; None: rows are logits. Logits are
            sums in float32 and not rounded to the dtype.
        first_id: the id that comes first in the weight or the logits, 0 or more.
        excluded_ids: at most 8 ids whose logits count as -inf, such as the mask token.
        num_candidates: how many of the largest logits to keep, 1 to 8.
        sampling: of the rows; None: all take their argmax. With filters the ids have to be the whole vocabulary.
        ids: of the rows; logits of ids that are not allowed count as -inf.

    Raises:
        KernelUnavailable: the op is not built for the device of `rows`.
        RuntimeError: an argument breaks the rules above; the message names it.
    """
    require("vocab_stats", rows.device.type)
    wants_sampled = sampling is not None and sampling.wants_sampled
    filters = sampling if sampling is not None and sampling.has_filter else None
    given = ids and ids.given
    results = torch.ops.vllm_dllm.vocab_stats(
        rows,
        weight,
        first_id,
        excluded_ids,
        num_candidates,
        wants_sampled,
        sampling and sampling.keys.contiguous(),
        sampling and sampling.temperature.contiguous(),
        filters and filters.top_k.contiguous(),
        filters and filters.top_p.contiguous(),
        given,
        ids and ids.allowed,
    )
    stats = PartialStats(*results)
    if not wants_sampled:
        stats = replace(stats, sampled_rest=None, sampled_weighted=None)
    return stats if given is not None else replace(stats, given_logits=None)


def fake(
    rows: Tensor,
    weight: Tensor | None,
    first_id: int,
    excluded_ids: list[int],
    num_candidates: int,
    wants_sampled: bool,
    *optional: Tensor | None,
) -> tuple[Tensor, ...]:
    """Return empty results of the fields of `PartialStats`; sampled sums that are not wanted have no rows."""
    check_one_device("vocab_stats", rows, weight, *optional)
    num_rows = rows.shape[0]
    *_, given_ids, _allowed = optional
    num_sampled = num_rows if wants_sampled else 0
    return (
        rows.new_empty((num_rows, num_candidates), dtype=torch.int64),
        rows.new_empty((num_rows, num_candidates), dtype=torch.float32),
        rows.new_empty(num_rows, dtype=torch.float64),
        rows.new_empty(num_rows, dtype=torch.float64),
        rows.new_empty(num_rows, dtype=torch.int64),
        rows.new_empty(num_rows, dtype=torch.float32),
        rows.new_empty(num_rows, dtype=torch.float64),
        rows.new_empty(num_sampled, dtype=torch.float64),
        rows.new_empty(num_sampled, dtype=torch.float64),
        rows.new_empty((num_rows, 0 if given_ids is None else given_ids.shape[1]), dtype=torch.float32),
    )
