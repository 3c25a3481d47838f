"""What happens after a forward: canvases advance, finished blocks are emitted."""

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from vllm_dllm.engine.step import Step
from vllm_dllm.state.counters import MAX_DEPTH, REPORT_LEN, Column
from vllm_dllm.unmask.walk import Trajectory

if TYPE_CHECKING:
    from vllm_dllm.engine.model_state import DllmModelState


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
            hidden: [num_rows, hidden_size], those for the LM head, what the model's `compute_logits` hands on.
            input_batch: the step's batch.

        Returns: `num_sampled` is what was unknown of a finished block and 0 otherwise; `num_rejected` is the rest of
            the drafts that vLLM counts, so that its counts advance by finished blocks alone. `num_nans` carries the
            step's report (`state.counters`) to our scheduler: vLLM has no other way for it.
        """
        step = self.model_state.step_of(input_batch)
        if step is None:
            return self._profile(hidden, input_batch)
        num_reqs, num_steps = input_batch.num_reqs, step.plan.num_reqs
        state, denoiser = self.model_state.state, self.model_state.denoiser
        sampled = torch.zeros(num_reqs, state.block_length, dtype=torch.int32, device=hidden.device)
        num_sampled = torch.zeros(num_reqs, dtype=torch.int32, device=hidden.device)
        num_rejected = torch.zeros_like(num_sampled)
        report = torch.zeros(num_reqs, REPORT_LEN, dtype=torch.int32, device=hidden.device)
        if num_steps == 0:  # prompts alone, which only vLLM's warm-up schedules so
            return _output(sampled, num_sampled, num_rejected, report)
        done = denoiser.advance(step.blocks, step.nodes, hidden, None if step.special is None else step.special.fresh)
        known = (step.num_known - step.blocks.start)[:, None]
        columns = torch.arange(state.block_length, device=hidden.device) + known
        sampled[:num_steps] = done.canvas.gather(1, columns.clamp(max=state.block_length - 1))
        num_sampled[:num_steps] = done.is_finished * (state.block_length - known[:, 0])
        num_rejected[:num_steps] = step.num_counted - num_sampled[:num_steps]
        report[:num_steps] = _report(step, done)
        denoiser.begin_blocks(step.blocks.slots, done.is_finished & ~done.came_over)
        step.came_over = done.came_over if step.nodes.end is not None else None
        return _output(sampled, num_sampled, num_rejected, report)

    def _profile(self, hidden: Tensor, input_batch: InputBatch) -> SamplerOutput:
        """Use as much memory as a real step can, for the run in which vLLM measures it; the result is not used."""
        denoiser = self.model_state.denoiser
        num_rows = min(denoiser.head.chunk_rows, self.model_state.max_num_tokens)
        denoiser.reduce(hidden[:1].expand(num_rows, -1).contiguous(), is_sampled=True)
        none = torch.zeros(input_batch.num_reqs, dtype=torch.int32, device=hidden.device)
        return _output(none[:, None], none, none, None)


def _report(step: Step, done: Trajectory) -> Tensor:
    """Put together what a step did for each request; [num_reqs, REPORT_LEN] int64."""
    nodes = step.nodes
    report = torch.zeros(len(nodes.canvas), REPORT_LEN, dtype=torch.int64, device=nodes.canvas.device)
    is_masked = nodes.is_masked[:, 0].any(1)
    decides = is_masked | done.came_over
    report[:, Column.FORWARDS] = decides
    if step.special is not None:
        report[:, Column.FORWARDS] = decides & ~step.special.refreshes
        report[:, Column.REFRESHES] = step.special.refreshes
        report[:, Column.COMMITS] = step.special.commits
    report[:, Column.UNMASKED] = done.num_unmasked
    report[:, Column.ACCEPTED] = done.num_accepted
    report[:, Column.FINISHED] = done.is_finished
    report[:, Column.STORED] = step.blocks.start + done.came_over * step.plan.block_length
    column = Column.PROPOSED - 1 + nodes.depth[:, 1:].clamp(1, MAX_DEPTH)
    return report.scatter_add_(1, column, (nodes.is_valid[:, 1:] & is_masked[:, None]).long())


def _output(sampled: Tensor, num_sampled: Tensor, num_rejected: Tensor, report: Tensor | None) -> SamplerOutput:
    return SamplerOutput(
        sampled_token_ids=sampled,
        logprobs_tensors=None,
        num_nans=report,
        num_sampled=num_sampled,
        num_rejected=num_rejected,
    )
