"""The runner's view of windows that slide: a step's rows in their physical order, and what is decided of them."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm_dllm.engine.model_state import DllmModelState
from vllm_dllm.engine.plan import StepPlan
from vllm_dllm.engine.plan_windows import plan_windows
from vllm_dllm.engine.step import Step
from vllm_dllm.ops.vocab_stats import RowIds
from vllm_dllm.state.canvas import Blocks
from vllm_dllm.state.draws import choose_draws
from vllm_dllm.state.kv import IntArray, KvStep
from vllm_dllm.state.settle import Emission
from vllm_dllm.state.sliding import physical_order, reorder, slide, unmasked_in_windows


class SlidingModelState(DllmModelState):
    """Its requests' canvases are windows (`state.sliding`)."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._draw = choose_draws(self.device)
        self._resumed: dict[int, list[int]] = {}  # windows of requests that come back, by slot

    def decide(self, step: Step, hidden: Tensor) -> Emission:
        """Unmask some of each window, and slide it."""
        state, blocks, nodes, slots = self.state, step.blocks, step.nodes, step.blocks.slots
        edits, keep = state.row_edits(blocks, nodes)
        sampling = self._draw(state, blocks, nodes) if state.is_sampled(blocks.slots_np) else None
        ids = None if edits is None else RowIds(edits=edits)
        stats = self.denoiser.head(hidden, sampling, 1, ids)
        before, is_masked = nodes.canvas[:, 0], nodes.is_masked[:, 0]
        entropy = stats.distribution(torch.ones_like(stats.rest)).entropy.view_as(before)
        chosen = unmasked_in_windows(entropy, is_masked, *state.window_rule(slots))
        token_ids = stats.token_ids.view_as(before)
        if keep is not None:
            chosen = keep(torch.zeros_like(slots), chosen, -entropy, token_ids)
        canvas = torch.where(chosen, token_ids, before)
        state.canvas[slots], emission = slide(before, canvas, blocks.start, step.ledger, state.mask_token_id)
        return emission

    def _begin_step(self, batch: InputBatch, num_computed_tokens: Tensor) -> Step:
        """Plan the step, and put the rows of windows into their order."""
        resumed = {} if self.order is None else self.order.canvases
        slot_of = dict(zip(batch.req_ids, batch.idx_mapping_np.tolist(), strict=False))
        self._resumed = {slot_of[request]: canvas for request, canvas in resumed.items()}
        step = super()._begin_step(batch, num_computed_tokens)
        if step.special is None:  # nobody takes it
            return step
        order = physical_order(step.nodes.canvas[:, 0], step.ledger.num_counted, self.state.mask_token_id)
        rows, head = reorder(step.special.rows, step.special.head, order)
        return replace(step, special=replace(step.special, rows=rows, head=head))

    def _begin_rows(self, blocks: Blocks, num_known: Tensor, index: Tensor) -> None:
        """Begin the first windows of requests; those of requests that were preempted are what they were."""
        super()._begin_rows(blocks, num_known, index)
        if self._resumed:
            windows = np.array([*self._resumed.values()], dtype=np.int64)
            windows = np.where(windows < 0, self.state.mask_token_id, windows)
            self.state.canvas[self._to_device(np.array([*self._resumed]))] = self._to_device(windows)

    def _plan(
        self, batch: InputBatch, kv: KvStep, block_start: IntArray, seq_len: IntArray, counted: IntArray
    ) -> StepPlan:
        if (counted != np.minimum(self.block_length, seq_len - block_start)).any():
            raise RuntimeError(f"vLLM scheduled {counted.tolist()} tokens of {batch.req_ids}, which are no windows")
        plan = plan_windows(kv, start=block_start, length=counted, block_length=self.block_length)
        return replace(plan, is_causal=np.ones(len(plan.role), dtype=bool))
