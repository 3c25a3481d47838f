"""What rows of logits say, from hidden rows and the head's weight, or from logits."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_dllm.ops.load import require


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
class PartialStats:
    """What rows of logits say of some ids of the vocabulary: enough to say the same of more ids together.

    With `l` a row's logits and `largest` the first of `top_logits`.
    """

    top_ids: Tensor  # [num_rows, num_candidates] int64, largest logit first, lowest id first of equal ones, -1: none
    top_logits: Tensor  # [num_rows, num_candidates] float32, -inf: none
    rest: Tensor  # [num_rows] float64, sum of exp(l - largest) over all ids but the first candidate
    weighted: Tensor  # [num_rows] float64, sum of (l - largest) exp(l - largest)
    token_ids: Tensor  # [num_rows] int64, the drawn token
    token_logits: Tensor  # [num_rows] float32, its logit
    scores: Tensor  # [num_rows] float64, its logit with noise


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
        noise and noise.keys,
        noise and noise.temperature,
        filters and filters.top_k,
        filters and filters.top_p,
    )
    return PartialStats(*results)


def fake(
    rows: Tensor, weight: Tensor | None, first_id: int, excluded_ids: list[int], num_candidates: int, *_: Tensor | None
) -> tuple[Tensor, ...]:
    """Return empty results of the fields of `PartialStats`."""
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
