"""What rows of logits say, from hidden rows and the head's weight, or from logits."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vllm_dllm.ops.load import check_one_device, require


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

    def without_filter(self) -> "RowSampling":
        """Return the same without top_k and top_p."""
        return replace(self, has_filter=False)

    def is_filtered(self) -> Tensor:
        """Tell whose token is drawn among what top_k or top_p leave; [num_rows] bool."""
        return (self.temperature > 0) & ((self.top_k > 0) | (self.top_p < 1))


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

    @property
    def confidence(self) -> Tensor:
        """[num_rows] float64, the probability of the drawn token, neither tempered nor filtered."""
        return torch.exp(self.token_logits.double() - self.top_logits[:, 0].double()) / (1.0 + self.rest)

    @property
    def log_probs(self) -> Tensor:
        """[num_rows, num_candidates] float64 of the candidates, neither tempered nor filtered; -inf: none."""
        top = self.top_logits.double()
        return top - top[:, :1] - torch.log1p(self.rest)[:, None]

    @property
    def log_sum_exp(self) -> Tensor:
        """[num_rows] float64."""
        return self.top_logits[:, 0].double() + torch.log1p(self.rest)

    @property
    def entropy(self) -> Tensor:
        """[num_rows] float64 in nats, of the distribution neither tempered nor filtered."""
        return torch.log1p(self.rest) - self.weighted / (1.0 + self.rest)


def merge(parts: Sequence[PartialStats]) -> PartialStats:
    """Put the statistics of consecutive shards of a vocabulary together.

    Args:
        parts: of the same rows, in the order of their ids, which decides between equal logits and scores.
    """
    tops = torch.stack([part.top_logits[:, 0] for part in parts]).double()  # [num_parts, num_rows]
    rest = torch.stack([part.rest for part in parts])
    first = tops.argmax(0)
    is_first = first == torch.arange(len(parts), device=first.device)[:, None]
    below = (tops - tops.amax(0)).masked_fill(tops == -torch.inf, 0.0)
    scale = below.exp().masked_fill(tops == -torch.inf, 0.0)
    mass = scale * (1.0 + rest)
    weighted = scale * torch.stack([part.weighted for part in parts]) + below * mass
    logits, order = torch.cat([part.top_logits for part in parts], 1).sort(dim=1, descending=True, stable=True)
    num_candidates = parts[0].top_ids.shape[1]
    scores = torch.stack([part.scores for part in parts])
    drawn = scores.argmax(0, keepdim=True)
    return PartialStats(
        top_ids=torch.cat([part.top_ids for part in parts], 1).gather(1, order[:, :num_candidates]),
        top_logits=logits[:, :num_candidates],
        rest=torch.where(is_first, rest, mass).sum(0),
        weighted=weighted.sum(0),
        token_ids=torch.stack([part.token_ids for part in parts]).gather(0, drawn)[0],
        token_logits=torch.stack([part.token_logits for part in parts]).gather(0, drawn)[0],
        scores=scores.gather(0, drawn)[0],
    )


def vocab_stats(
    rows: Tensor,
    weight: Tensor | None,
    *,
    first_id: int = 0,
    excluded_ids: Sequence[int],
    num_candidates: int,
    sampling: RowSampling | None,
) -> PartialStats:
    """Reduce the logits of each row, which never exist together.

    The token of a row is the argmax of `l + temperature * gumbel` in float64, within what top_k and top_p keep, with
    the noise of `noise.gumbel`; at temperature 0, and without sampling, the argmax of `l`. A logit of -inf is no
    candidate; NaN is none either, but makes `rest` and `weighted` NaN. A row without candidates draws `first_id`.

    Args:
        rows: [num_rows, hidden_size] float32, float16 or bfloat16, or logits [num_rows, num_ids]; last dim contiguous.
        weight: [num_ids, hidden_size] of the dtype of rows, last dim contiguous; None: rows are logits. Logits are
            sums in float32 and not rounded to the dtype.
        first_id: the id that comes first in the weight or the logits, 0 or more.
        excluded_ids: at most 8 ids whose logits count as -inf, such as the mask token.
        num_candidates: how many of the largest logits to keep, 1 to 8.
        sampling: of the rows; None: all take their argmax. With filters the ids have to be the whole vocabulary.

    Raises:
        KernelUnavailable: the op is not built for the device of `rows`.
        RuntimeError: an argument breaks the rules above; the message names it.
    """
    require("vocab_stats", rows.device.type)
    noise = sampling if sampling is not None and sampling.has_noise else None
    filters = noise if noise is not None and noise.has_filter else None
    results = torch.ops.vllm_dllm.vocab_stats(
        rows,
        weight,
        first_id,
        excluded_ids,
        num_candidates,
        noise and noise.keys.contiguous(),
        noise and noise.temperature.contiguous(),
        filters and filters.top_k.contiguous(),
        filters and filters.top_p.contiguous(),
    )
    return PartialStats(*results)


def fake(
    rows: Tensor,
    weight: Tensor | None,
    first_id: int,
    excluded_ids: list[int],
    num_candidates: int,
    *sampling: Tensor | None,
) -> tuple[Tensor, ...]:
    """Return empty results of the fields of `PartialStats`."""
    check_one_device("vocab_stats", rows, weight, *sampling)
    num_rows = rows.shape[0]
    return (
        rows.new_empty((num_rows, num_candidates), dtype=torch.int64),
        rows.new_empty((num_rows, num_candidates), dtype=torch.float32),
        rows.new_empty(num_rows, dtype=torch.float64),
        rows.new_empty(num_rows, dtype=torch.float64),
        rows.new_empty(num_rows, dtype=torch.int64),
        rows.new_empty(num_rows, dtype=torch.float32),
        rows.new_empty(num_rows, dtype=torch.float64),
    )
