"""The runner's view of self-speculation: a step's windows, and what is decided of them."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.states import RequestState

from vllm_dllm.arrays import IntArray, to_device
from vllm_dllm.engine.model_state import DllmModelState
from vllm_dllm.engine.plan import Role, StepPlan
from vllm_dllm.engine.plan_windows import plan_windows
from vllm_dllm.engine.step import Step
from vllm_dllm.ops.vocab_stats import RowSampling
from vllm_dllm.state.canvas import Blocks
from vllm_dllm.state.kv import KvStep
from vllm_dllm.state.records import EmittedLogprobs
from vllm_dllm.state.settle import Emission
from vllm_dllm.state.windows import settle_windows
from vllm_dllm.unmask.logprobs import Unmasked


class WindowModelState(DllmModelState):
    """Its requests' canvases are windows, of the number of positions that vLLM counts (`state.windows`)."""

    @property
    def never_chosen(self) -> int | None:
        """None: an autoregressive model may choose the mask token."""
        return None

    def decide(self, step: Step, hidden: Tensor) -> Emission:
        """Accept drafts of windows that are verified, keep those of the others."""
        state, blocks = self.state, step.blocks
        sampling = None
        if state.is_sampled(blocks.slots_np):  # the same noise for a position, whichever row chooses its token
            first = blocks.start if step.ledger.begun is None else blocks.start + step.ledger.begun
            sampling = state.row_sampling(blocks.slots_np, blocks.slots, first, torch.ones_like(first))
        token_ids = self._choose(step, hidden, sampling).view(-1, self.block_length)
        canvas, emission = settle_windows(step.nodes.canvas[:, 0], token_ids, blocks, step.ledger, state.mask_token_id)
        state.canvas[blocks.slots] = canvas
        return replace(emission, logprobs=self._logprobs(blocks, hidden, token_ids, emission.num_sampled))

    def _logprobs(
        self, blocks: Blocks, hidden: Tensor, token_ids: Tensor, num_sampled: Tensor
    ) -> EmittedLogprobs | None:
        """Return log-probabilities of what is emitted, by the rows that verified it, of the requests that ask."""
        asking, head = self.state.records.asking(blocks.slots, blocks.slots_np), self.denoiser.logprob_head
        if asking is None or head is None:
            return None
        row = torch.arange(len(hidden), device=self.device).view_as(token_ids)
        is_emitted = row - row[:, :1] < num_sampled[: len(row), None]
        its = [each[asking.place][:, None] for each in (row, token_ids, is_emitted)]
        found = Unmasked(*its).log_probs(head, hidden, None, asking.num_top, asking.keeps_mask)
        return EmittedLogprobs(asking.place_np, found.view(len(asking.slots), self.block_length))

    def _choose(self, step: Step, hidden: Tensor, sampling: RowSampling | None) -> Tensor:
        """Return the tokens that the rows of the windows choose, [num_reqs * block_length] int64; 0 behind them.

        Args:
            step: of them.
            hidden: [num_reqs * block_length, hidden_size], where a window is shorter with rows that say nothing.
            sampling: of these rows; None: all take their argmax.
        """
        length = (step.plan.end - step.plan.begin)[step.plan.decides]
        own = to_device(np.flatnonzero(np.arange(self.block_length) < length[:, None]), self.device)
        token_ids = torch.zeros(len(hidden), dtype=torch.int64, device=self.device)
        token_ids[own] = self.denoiser.head(hidden[own], sampling and sampling.of(own), 1).token_ids
        return token_ids

    def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> dict[str, Any]:
        """Tell the model which rows draft, besides: they take the checkpoint's own adapter."""
        inputs, step = super().prepare_inputs(input_batch, req_states), self.step_of(input_batch)
        if step is not None:
            plan = step.plan
            drafts = np.flatnonzero((plan.role == Role.ROOT).repeat(plan.end - plan.begin))
            inputs["draft_rows"] = to_device(drafts, self.device) if len(drafts) else None
        return inputs

    def _plan(
        self, batch: InputBatch, kv: KvStep, block_start: IntArray, seq_len: IntArray, counted: IntArray
    ) -> StepPlan:
        if (counted < 1).any() or (counted > self.block_length).any():
            raise RuntimeError(f"vLLM scheduled {counted.tolist()} tokens of {batch.req_ids}, which are no windows")
        return plan_windows(kv, start=block_start, length=counted, block_length=self.block_length)
