"""What the drafts of a slot's next step are made from."""

import torch
from torch import Tensor

from vllm_dllm.state.canvas import CanvasState


class DraftState:
    """The hidden rows and the canvas of each slot's last decided step.

    Drafts are made when a step has room for them, so that a step without costs nothing more than this copy.
    """

    def __init__(self, canvases: CanvasState, hidden_size: int, dtype: torch.dtype) -> None:
        num_slots, block_length = canvases.canvas.shape
        device = canvases.device
        self.hidden = torch.zeros(num_slots, block_length, hidden_size, dtype=dtype, device=device)
        self.was_masked = torch.zeros(num_slots, block_length, dtype=torch.bool, device=device)
        self.is_known = torch.zeros(num_slots, dtype=torch.bool, device=device)

    def put(self, slots: Tensor, hidden: Tensor, was_masked: Tensor) -> None:
        """Remember a step.

        Args:
            slots: [num_reqs] int64.
            hidden: [num_reqs, block_length, hidden_size], of the canvas that the step decided.
            was_masked: [num_reqs, block_length] bool, in that canvas.
        """
        self.hidden[slots] = hidden
        self.was_masked[slots] = was_masked
        self.is_known.index_fill_(0, slots, value=True)  # an assignment would wait for the device

    def forget(self, slots: Tensor, where: Tensor) -> None:
        """Forget the step of those of the given slots that `where` [num_reqs] bool marks."""
        self.is_known[slots] = self.is_known[slots] & ~where
