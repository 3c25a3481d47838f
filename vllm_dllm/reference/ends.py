"""Where an answer ends before its last block does (ours): what it still has behind that needs no forwards.

The published loops go on to the end of the block, or of all blocks, and whoever reads the answer stops at its end.
Tokens never change, so what is before the end is the same.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Ends:
    """What ends an answer."""

    ids: tuple[int, ...] = ()  # tokens that do, from the last of `min_tokens` on
    min_tokens: int = 0
    max_tokens: int | None = None

    def reached(self, answer: Tensor, is_masked: Tensor) -> bool:
        """Tell whether all of an answer is known up to its end.

        Args:
            answer: [len] int64, behind the prompt.
            is_masked: [len] bool.
        """
        num_known = int(is_masked.long().argmax()) if is_masked.any() else len(answer)
        if self.max_tokens is not None and num_known >= self.max_tokens:
            return True
        ends = torch.isin(answer[:num_known], answer.new_tensor(self.ids))
        return bool(ends[max(0, self.min_tokens - 1) :].any())

    def cut(self, answer: list[int]) -> list[int]:
        """Return an answer up to its end, and all of one that has none."""
        for index, token in enumerate(answer[: self.max_tokens]):
            if token in self.ids and index + 1 >= self.min_tokens:
                return answer[: index + 1]
        return answer[: self.max_tokens]


NO_ENDS = Ends()
"""As published."""
