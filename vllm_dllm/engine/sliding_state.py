"""The runner's view of windows that slide: a step's rows in their physical order, and what is decided of them."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm_dllm.arrays import IntArray, to_device
from vllm_dllm.draft.graph import MAX_CANDIDATES
from vllm_dllm.draft.windows import WindowDrafter, with_order
from vllm_dllm.engine.model_state import DllmModelState
from vllm_dllm.engine.plan import StepPlan
from vllm_dllm.engine.plan_windows import plan_windows
from vllm_dllm.engine.step import Step
from vllm_dllm.ops.vocab_stats import PartialStats, RowIds
from vllm_dllm.state.canvas import Blocks
from vllm_dllm.state.kv import KvStep
from vllm_dllm.state.settle import Emission
from vllm_dllm.state.sliding import penalised_entropy, physical_order, reorder, slide, unmasked_in_windows
from vllm_dllm.unmask.stats import candidates_of
from vllm_dllm.unmask.windows import OwnWindows, walk_windows


class SlidingModelState(DllmModelState):
    """Its requests' canvases are windows (`state.sliding`)."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._resumed: dict[int, list[int]] = {}  # windows of requests that come back, by slot

    @property
    def drafter(self) -> WindowDrafter | None:
        """Who drafts windows; None without speculation."""
        drafter = self.denoiser.drafter
        assert drafter is None or isinstance(drafter, WindowDrafter), "made by the same settings"
        return drafter

    def decide(self, step: Step, hidden: Tensor) -> Emission:
        """Unmask some of each window, as far as drafts came true of the next ones too, and slide them."""
        nodes, slots, own = step.nodes, step.blocks.slots, step.windows
        assert own is not None, "of each step that anybody takes"
        stats, penalised, chosen = self._choose(step, own, hidden)
        after = own.unmasked(chosen, stats.token_ids.view_as(own.canvas))
        position = step.blocks.start[own.request, None] + torch.arange(after.shape[1], device=after.device)
        is_over = self.state.ends.reached(slots[own.request], position, after, self.state.mask_token_id)
        walked = walk_windows(nodes, after, is_over, self.state.mask_token_id)
        canvas, emission = slide(nodes, walked, step.blocks.start, step.ledger, self.state.mask_token_id)
        self.state.canvas[slots] = canvas[:, : self.block_length]
        if self.drafter is not None:
            last = own.index(nodes, walked.node)
            candidates = candidates_of(stats).view(*own.canvas.shape).of(last)
            left = penalised.masked_fill(chosen, torch.inf)[last]
            self.drafter.observe(slots, left, candidates, emission.num_sampled[: len(slots)] - own.front[last])
        return emission

    def _choose(self, step: Step, own: OwnWindows, hidden: Tensor) -> tuple[PartialStats, Tensor, Tensor]:
        """Decide which positions a step of each window unmasks.

        Args:
            step: of them.
            own: the windows.
            hidden: [num_evaluated * window, hidden_size].

        Returns: statistics of the rows, the entropies with their penalties [num_evaluated, window] float64, infinite
            where nothing is masked, and what is unmasked, [num_evaluated, window] bool.
        """
        state, begin = self.state, step.blocks.start[own.request]
        slots_np = step.blocks.slots_np[step.plan.request[step.plan.decides]]
        blocks, windows = Blocks(step.blocks.slots[own.request], slots_np, begin + own.front), own.nodes()
        edits, keep = state.row_edits(blocks, windows, (begin, own.state))
        sampling = self.denoiser.draw(state, blocks, windows) if state.is_sampled(slots_np) else None
        ids = None if edits is None else RowIds(edits=edits)
        stats = self.denoiser.head(hidden, sampling, 1 if self.drafter is None else MAX_CANDIDATES, ids)
        entropy = stats.distribution(torch.ones_like(stats.rest)).entropy.view_as(own.canvas)
        bound, penalty = state.window_rule(blocks.slots)
        penalised = penalised_entropy(entropy, own.is_masked, penalty)
        chosen = unmasked_in_windows(penalised, bound)
        if keep is not None:
            chosen = keep(torch.zeros_like(own.request), chosen, -entropy, stats.token_ids.view_as(own.canvas))
        return stats, penalised, chosen

    def shown(self, slots: Tensor) -> Tensor:
        """Return the windows of slots; a masked position says whose draft is the first to know it."""
        if self.drafter is None:
            return super().shown(slots)
        return with_order(self.state.canvas[slots], self.drafter.turns(slots), self.state.mask_token_id)

    def _begin_step(self, batch: InputBatch, num_computed_tokens: Tensor) -> Step:
        """Plan the step, put the rows of its states into their order, and take those of their windows to the head."""
        resumed = {} if self.order is None else self.order.canvases
        slot_of = dict(zip(batch.req_ids, batch.idx_mapping_np.tolist(), strict=False))
        self._resumed = {slot_of[request]: canvas for request, canvas in resumed.items()}
        step = super()._begin_step(batch, num_computed_tokens)
        if step.special is None or step.nodes.evaluated is None:  # nobody takes it
            return step
        room = self.state.seq_len[step.blocks.slots] - step.blocks.start
        own = OwnWindows.of(step.nodes, room, self.block_length, self.state.mask_token_id)
        plan = step.plan
        length = to_device((plan.end - plan.begin)[plan.decides], self.device)
        order = physical_order(own.state, length, self.state.mask_token_id)
        rows, head = reorder(step.special.rows, step.special.head, order, step.nodes.evaluated)
        return replace(step, special=replace(step.special, rows=rows, head=head.gather(1, own.place)), windows=own)

    def _begin_rows(self, blocks: Blocks, num_known: Tensor, index: Tensor) -> None:
        """Begin the first windows of requests; those of requests that were preempted are what they were."""
        super()._begin_rows(blocks, num_known, index)
        if self._resumed:
            windows = np.array([*self._resumed.values()], dtype=np.int64)
            windows = np.where(windows < 0, self.state.mask_token_id, windows)
            self.state.canvas[to_device(np.array([*self._resumed]), self.device)] = to_device(windows, self.device)

    def _plan(
        self, batch: InputBatch, kv: KvStep, block_start: IntArray, seq_len: IntArray, counted: IntArray
    ) -> StepPlan:
        given = {} if self.order is None else self.order.drafts
        drafts = [given.get(request, ()) for request in batch.req_ids[: len(counted)]]
        num_windows = 1 + np.array([bool(rows) for rows in drafts], dtype=np.int64)
        if (counted != np.minimum(num_windows * self.block_length, seq_len - block_start)).any():
            raise RuntimeError(f"vLLM scheduled {counted.tolist()} tokens of {batch.req_ids}, which are no windows")
        plan = plan_windows(
            kv,
            start=block_start,
            length=np.minimum(counted, self.block_length),
            block_length=int(num_windows.max(initial=1)) * self.block_length,
            drafts=drafts,
        )
        return replace(plan, is_causal=np.ones(len(plan.role), dtype=bool))
