"""What the drafts of a slot's next step are made from."""

import torch
from torch import Tensor

from vllm_dllm.draft.graph import MAX_CANDIDATES
from vllm_dllm.state.canvas import CanvasState
from vllm_dllm.unmask.stats import Candidates


class DraftState:
    """The candidates and the canvas of each slot's last decided step.

    Drafts are made when a step has room for them, so that a step without costs nothing more than this copy.
    """

    def __init__(self, canvases: CanvasState) -> None:
        num_slots, block_length = canvases.canvas.shape
        device = canvases.device
        shape = (num_slots, block_length, MAX_CANDIDATES)
        self._token_ids = torch.zeros(shape, dtype=torch.int64, device=device)
        self._log_probs = torch.zeros(shape, dtype=torch.float64, device=device)
        self.was_masked = torch.zeros(num_slots, block_length, dtype=torch.bool, device=device)
        self.is_known = torch.zeros(num_slots, dtype=torch.bool, device=device)

    @property
    def tensors(self) -> list[Tensor]:
        """All that is kept, as the op `settle_step` writes it."""
        return [self._token_ids, self._log_probs, self.was_masked, self.is_known]

    def candidates(self, slots: Tensor) -> Candidates:
        """Return the candidates of the given slots; [num_reqs, block_length, MAX_CANDIDATES]."""
        return Candidates(self._token_ids[slots], self._log_probs[slots])

    def put(self, slots: Tensor, candidates: Candidates, was_masked: Tensor) -> None:
        """Remember a step.

        Args:
            slots: [num_reqs] int64.
            candidates: [num_reqs, block_length, MAX_CANDIDATES], of the canvas that the step decided.
            was_masked: [num_reqs, block_length] bool, in that canvas.
        """
        self._token_ids[slots] = candidates.token_ids
        self._log_probs[slots] = candidates.log_probs
        self.was_masked[slots] = was_masked
        self.is_known.index_fill_(0, slots, value=True)  # an assignment would wait for the device

    def forget(self, slots: Tensor, where: Tensor) -> None:
        """Forget the step of those of the given slots that `where` [num_reqs] bool marks."""
        self.is_known[slots] = self.is_known[slots] & ~where
