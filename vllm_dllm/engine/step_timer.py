"""How long a step takes on this device: measured when a worker starts, as the steps of requests will run."""

import time
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import set_forward_context

from vllm_dllm.engine.costs import StepShape

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    from vllm_dllm.engine.model_state import DllmModelState

CONTEXT_LEN = 512
"""Positions that a measured request has stored."""


class StepTimer:
    """Times forwards with their row statistics, on canvases that belong to nobody.

    Args:
        runner: of a worker that is warm, and has captured its CUDA graphs where there are any.
    """

    def __init__(self, runner: "GPUModelRunner") -> None:
        self._runner = runner
        self._state: DllmModelState = runner.model_state
        self._lora = runner.vllm_config.lora_config

    def captured_rows(self) -> list[int]:
        """Return the rows of the CUDA graphs that steps with drafts replay, ascending."""
        sizes = sorted(self._runner.vllm_config.compilation_config.cudagraph_capture_sizes or ())
        return [rows for rows in sizes if self._graph(1, rows).cg_mode == CUDAGraphMode.FULL]

    @torch.inference_mode()
    def measure(self, shape: StepShape) -> float:
        """Return the milliseconds of a step, the better of two runs, with as many adapters as it may have."""
        with self._adapters(shape):
            forward = self._replay(shape) if shape.is_captured else self._eager(shape)
            return min(self._time(forward) for _ in range(2))

    def _time(self, forward: Any) -> float:
        begin = time.perf_counter()
        self._state.denoiser.reduce(forward(), is_sampled=False)
        if self._state.device.type != "cpu":
            torch.accelerator.synchronize()
        return 1e3 * (time.perf_counter() - begin)

    def _eager(self, shape: StepShape) -> Any:
        state = self._state
        attention = state.attention.example(shape.num_reqs, shape.num_canvases, self._context_len)
        ids, positions = self._rows(shape)

        def forward() -> Tensor:
            with set_forward_context(attention, state.vllm_config, num_tokens=len(ids), slot_mapping={}):
                hidden: Tensor = state.model(input_ids=ids, positions=positions)
            return hidden

        return forward

    def _replay(self, shape: StepShape) -> Any:
        """Fill the tensors that the graph reads; its padding is what a step of as many canvases would have."""
        self._state.attention.example(shape.num_reqs, shape.num_canvases, self._context_len, graph_rows=shape.rows)
        ids, positions = self._rows(shape)
        buffers, graph = self._runner.input_buffers, self._graph(shape.num_reqs, shape.rows)
        buffers.input_ids[: len(ids)], buffers.positions[: len(ids)] = ids, positions
        return lambda: self._runner.cudagraph_manager.run_fullgraph(graph)[: len(ids)]

    def _rows(self, shape: StepShape) -> tuple[Tensor, Tensor]:
        num_rows, device = shape.num_reqs * shape.num_canvases * self._state.block_length, self._state.device
        ids = torch.full((num_rows,), self._state.state.mask_token_id, device=device)
        return ids, torch.arange(num_rows, device=device) % self._state.block_length

    def _graph(self, num_reqs: int, rows: int) -> Any:
        num_adapters = 0 if self._lora is None else self._lora.max_loras
        return self._runner.cudagraph_manager.dispatch(num_reqs, rows, None, num_adapters)

    @property
    def _context_len(self) -> int:
        return min(self._state.max_model_len - self._state.block_length, CONTEXT_LEN)

    def _adapters(self, shape: StepShape) -> AbstractContextManager[None]:
        if self._lora is None:
            return nullcontext()
        each = shape.num_canvases * self._state.block_length
        num_rows, num_sampled = (np.full(shape.num_reqs, n, dtype=np.int32) for n in (each, 1))
        with_adapters: AbstractContextManager[None] = self._runner.maybe_dummy_run_with_lora(
            self._lora, num_rows, num_sampled, num_active_loras=self._lora.max_loras
        )
        return with_adapters
