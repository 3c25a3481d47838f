"""What happens after a forward: canvases advance, finished blocks are emitted."""

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from vllm_dllm.denoiser import Decision, Nodes
from vllm_dllm.state.counters import MAX_DEPTH, REPORT_LEN, Column

if TYPE_CHECKING:
    from vllm_dllm.engine.model_state import DenoiseStep, DllmModelState


class DllmSampler:
    """Stands where the runner expects vLLM's sampler."""

    # The runner reads this for its token counts; None means that it keeps none.
    penalties_state = SimpleNamespace(output_bin_counts=None)

    def __init__(self, model_state: "DllmModelState") -> None:
        self.model_state = model_state

    def add_request(self, req_idx: int, sampling_params: Any) -> None:
        """Do nothing: the model state keeps all parameters."""

    def apply_staged_writes(self) -> None:
        """Do nothing: the model state keeps all parameters."""

    def __call__(self, hidden: Tensor, input_batch: InputBatch) -> SamplerOutput:
        """Advance every denoising request and emit the blocks that are now finished.

        Args:
            hidden: [num_denoising * num_nodes * block_length, hidden_size], what the model's `compute_logits` hands on.
            input_batch: the step's batch.

        Returns: `num_sampled` is block_length for a finished block and 0 otherwise; `num_rejected` is the rest of the
            rows that a denoising request was scheduled, so that both vLLM's counts advance by finished blocks alone.
            `num_nans` carries the step's report (`state.counters`) to our scheduler: vLLM has no other way for it.
        """
        step = self.model_state.step_of(input_batch)
        if step is None:
            return self._profile(hidden, input_batch)
        state, num_reqs = self.model_state.state, step.num_reqs
        sampled = torch.zeros(input_batch.num_reqs, state.block_length, dtype=torch.int32, device=hidden.device)
        num_sampled = torch.zeros(input_batch.num_reqs, dtype=torch.int32, device=hidden.device)
        num_rejected = torch.zeros_like(num_sampled)
        report = torch.zeros(input_batch.num_reqs, REPORT_LEN, dtype=torch.int32, device=hidden.device)
        begin = 0
        for group in step.groups if num_reqs else ():
            rows = hidden[begin : begin + len(group.index_np) * group.num_nodes * state.block_length]
            begin += len(rows)
            decision = self.model_state.denoiser.advance(group.blocks, group.nodes, group.evaluated(rows))
            tail = step.num_known[group.index] - group.blocks.start
            sampled[:num_reqs][group.index] = _behind(state.canvas[group.blocks.slots], tail)
            num_sampled[:num_reqs][group.index] = (decision.is_finished * (state.block_length - tail)).int()
            num_rejected[:num_reqs][group.index] = ...
            report[:num_reqs][group.index] = _report(step, group, decision)
            self.model_state.denoiser.begin_blocks(group.blocks.slots, decision.is_finished)
        begins = input_batch.idx_mapping[num_reqs : input_batch.num_reqs]
        self.model_state.denoiser.begin_blocks(begins, torch.ones_like(begins, dtype=torch.bool))
        return _output(sampled, num_sampled, num_rejected, report)

    def _profile(self, hidden: Tensor, input_batch: InputBatch) -> SamplerOutput:
        """Use as much memory as a real step can, for the run in which vLLM measures it; the result is not used."""
        denoiser = self.model_state.denoiser
        num_rows = min(denoiser.head.chunk_rows, self.model_state.max_num_tokens)
        denoiser.reduce(hidden[:1].expand(num_rows, -1).contiguous(), is_sampled=True)
        none = torch.zeros(input_batch.num_reqs, dtype=torch.int32, device=hidden.device)
        return _output(none[:, None], none, none, None)


def _report(step: "DenoiseStep", nodes: Nodes, decision: Decision) -> Tensor:
    """Put together what a step did for each denoising request; [num_reqs, REPORT_LEN] int64."""
    report = torch.zeros(step.num_reqs, REPORT_LEN, dtype=torch.int64, device=nodes.canvas.device)
    report[:, Column.FORWARDS] = nodes.is_masked[:, 0].any(1)
    report[:, Column.REFRESHES] = step.num_refreshes
    report[:, Column.UNMASKED] = step.num_unmasked + decision.num_unmasked
    report[:, Column.ACCEPTED] = decision.num_accepted
    report[:, Column.FINISHED] = decision.is_finished
    column = Column.PROPOSED - 1 + nodes.depth[:, 1:].clamp(1, MAX_DEPTH)
    return report.scatter_add_(1, column, nodes.is_valid[:, 1:].long())


def _output(sampled: Tensor, num_sampled: Tensor, num_rejected: Tensor, report: Tensor | None) -> SamplerOutput:
    return SamplerOutput(
        sampled_token_ids=sampled,
        logprobs_tensors=None,
        num_nans=report,
        num_sampled=num_sampled,
        num_rejected=num_rejected,
    )
