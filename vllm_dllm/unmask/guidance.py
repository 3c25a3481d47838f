"""Classifier-free guidance of a step's rows: logits = u + (scale + 1) (c - u), before anything else is done to them.

c are those of the sequence, u those of its *twin*, whose prompt is masked (LLaDA, Dream, SMDM: `cfg_scale`). Both are
evaluated in the same forward.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vllm_dllm.ops.vocab_stats import RowIds

HeadLogits = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Guidance:
    """What guides some rows."""

    scale: Tensor  # [num_rows] float32, 0: the row is not guided
    twins: Tensor  # [num_rows, hidden_size], of the twins; those of rows that are not guided say nothing

    def of(self, row: Tensor | slice) -> "Guidance":
        """Return that of some rows."""
        return Guidance(self.scale[row], self.twins[row])

    def apply(self, logits: Tensor, head_logits: HeadLogits) -> Tensor:
        """Return the rows' logits [num_rows, vocab_size] guided, float32; they may be overwritten."""
        logits, twins = logits.float(), head_logits(self.twins).float()
        guided = twins + (self.scale[:, None] + 1) * (logits - twins)
        return torch.where(self.scale[:, None] > 0, guided, logits)


def wanted_logits(head_logits: HeadLogits, hidden: Tensor, ids: "RowIds | None") -> Tensor:
    """Return logits [num_rows, vocab_size] of hidden rows as their requests want them: guided, then edited."""
    logits = head_logits(hidden)
    if ids is not None and ids.guidance is not None:
        logits = ids.guidance.apply(logits, head_logits)
    if ids is not None and ids.edits is not None:
        logits = ids.edits.apply(logits)
    return logits
