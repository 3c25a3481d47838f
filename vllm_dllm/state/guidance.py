"""How strongly each slot's request is guided by its prompt (`unmask.guidance`)."""

import numpy as np
import torch
from torch import Tensor

from vllm_dllm.arrays import IntArray, write
from vllm_dllm.unmask.guidance import Guidance
from vllm_dllm.unmask.walk import Nodes


class GuidanceState:
    """Scales and prompts of up to `max_num_reqs` requests.

    Args:
        max_num_reqs: slots.
        device: of the scales.
    """

    def __init__(self, max_num_reqs: int, device: torch.device) -> None:
        self._scale_np = np.zeros(max_num_reqs, dtype=np.float32)
        self._prompt_len_np = np.zeros(max_num_reqs, dtype=np.int64)
        self._scale = torch.zeros(max_num_reqs, dtype=torch.float32, device=device)
        self._is_staged = False

    def put(self, slot: int, scale: float, prompt_len: int) -> None:
        """Stage those of a request."""
        self._is_staged |= scale != self._scale_np[slot]
        self._scale_np[slot], self._prompt_len_np[slot] = scale, prompt_len

    def apply_staged_writes(self) -> None:
        """Copy what was staged to the device."""
        if self._is_staged:
            write(self._scale_np, self._scale)
            self._is_staged = False

    def prompts(self, slots_np: IntArray) -> IntArray | None:
        """Return the prompts' lengths of those of some requests that are guided, 0 for the others; None: nobody is."""
        is_guided = self._scale_np[slots_np] > 0
        return np.where(is_guided, self._prompt_len_np[slots_np], 0) if is_guided.any() else None

    def split(self, slots: Tensor, nodes: Nodes, hidden: Tensor, twin_of: Tensor) -> tuple[Tensor, Guidance | None]:
        """Tell apart the rows of a step's canvases from those of their twins, which lie behind.

        Args:
            slots: [num_reqs] int64.
            nodes: the canvases.
            hidden: [(num_evaluated + num_twins) * block_length, hidden_size].
            twin_of: [num_twins] int64, of which evaluated canvas each is.

        Returns: the canvases' rows, and what guides them.
        """
        if not len(twin_of):
            return hidden, None
        block_length = nodes.canvas.shape[2]
        own, twins = hidden.split([len(hidden) - len(twin_of) * block_length, len(twin_of) * block_length])
        scale = nodes.per_evaluated(self._scale[slots][:, None].expand(nodes.depth.shape))
        aligned = torch.zeros_like(own).view(len(scale), block_length, -1)
        aligned[twin_of] = twins.view(len(twin_of), block_length, -1)
        return own, Guidance(scale.repeat_interleave(block_length), aligned.flatten(0, 1))
