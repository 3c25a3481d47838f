"""Adapters (LoRA) on a CPU: vLLM's torch code, with each row's own adapter and nothing for rows without one."""

from typing import Any

from torch import Tensor
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from vllm_dllm.engine.patches import become


class CpuAdapters(PunicaWrapperCPU):
    """Adds adapters' products by runs of rows that have the same one.

    vLLM's own takes a copy of A and B for each row. A row without an adapter has the index -1, and gets the last slot's
    unless the whole batch has none: those who ask for the base model would get an adapter that others asked for.
    """

    _runs: tuple[tuple[slice, int], ...] = ()
    """Of the latest mapping: rows that follow each other, and the slot of their adapter."""

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        """Take the mapping of a step's rows."""
        super().update_metadata(*args, **kwargs)
        starts, lengths, slots = (part.tolist() for part in self.prefill_metadata[:3])
        runs = zip(starts, lengths, slots, strict=True)
        self._runs = tuple((slice(start, start + length), slot) for start, length, slot in runs if slot >= 0)

    def _shrink_prefill(self, y: Tensor, x: Tensor, w_t_all: Tensor, scale: float) -> None:
        """Set y [num_rows, rank] to scale * x A^T; w_t_all: [num_slots, 1, rank, num_inputs]. Others keep theirs."""
        for rows, slot in self._runs:
            y[rows] = scale * (x[rows].to(y.dtype) @ w_t_all[slot, 0].to(y.dtype).T)

    def _expand_slice_prefill(
        self, y: Tensor, x: Tensor, w_t_all: Tensor, y_offset: int, y_slice_size: int, add_inputs: bool
    ) -> None:
        """Add x B^T to columns of y [num_rows, num_outputs]; w_t_all: [num_slots, 1, y_slice_size, rank]."""
        assert add_inputs, "vLLM's linear layers add to what the base model says"
        for rows, slot in self._runs:
            y[rows, y_offset : y_offset + y_slice_size] += x[rows].to(y.dtype) @ w_t_all[slot, 0].to(y.dtype).T


def use_own_rows(lora_manager: Any) -> None:
    """Have a runner's manager of adapters, which vLLM made with the model, apply them so."""
    for wrapper in lora_manager._adapter_manager.punica_wrapper_mapping.values():
        become(wrapper, CpuAdapters)
