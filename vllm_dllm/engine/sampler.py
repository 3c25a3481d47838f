"""What happens after a forward: canvases advance, finished blocks are emitted."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from vllm_dllm.engine.step import DenoiseStep, Group
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
            hidden: [num_rows, hidden_size], of the step's groups, what the model's `compute_logits` hands on.
            input_batch: the step's batch.

        Returns: `num_sampled` is what was unknown of a finished block and 0 otherwise; `num_rejected` is the rest of
            the rows that a denoising request was scheduled, so that both vLLM's counts advance by finished blocks
            alone. `num_nans` carries the step's report (`state.counters`) to our scheduler: vLLM has no other way for
            it.
        """
        step = self.model_state.step_of(input_batch)
        if step is None:
            return self._profile(hidden, input_batch)
        state, denoiser = self.model_state.state, self.model_state.denoiser
        sampled = torch.zeros(input_batch.num_reqs, state.block_length, dtype=torch.int32, device=hidden.device)
        num_sampled = torch.zeros(input_batch.num_reqs, dtype=torch.int32, device=hidden.device)
        num_rejected = torch.zeros_like(num_sampled)
        report = torch.zeros(input_batch.num_reqs, REPORT_LEN, dtype=torch.int32, device=hidden.device)
        for group, done in self._decided(step, hidden):
            index, tail = group.index, (step.num_known[group.index] - group.blocks.start)[:, None]
            columns = torch.arange(state.block_length, device=hidden.device) + tail
            emitted = done.canvas.gather(1, columns.clamp(max=state.block_length - 1)).int()
            num_emitted = (done.is_finished * (state.block_length - tail[:, 0])).int()
            sampled[: step.num_reqs][index] = emitted
            num_sampled[: step.num_reqs][index] = num_emitted
            num_rejected[: step.num_reqs][index] = group.num_scheduled - num_emitted
            report[: step.num_reqs][index] = _report(step, group, done).int()
            denoiser.begin_blocks(group.blocks.slots, done.is_finished & ~done.came_over)
            group.came_over = done.came_over if group.looks_ahead else None
        begins = input_batch.idx_mapping[step.num_reqs : input_batch.num_reqs]
        denoiser.begin_blocks(begins, torch.ones_like(begins, dtype=torch.bool))
        return _output(sampled, num_sampled, num_rejected, report)

    def _decided(self, step: DenoiseStep, hidden: Tensor) -> Iterator[tuple[Group, Trajectory]]:
        """Decide the canvases of all groups; those of groups without rows are finished."""
        denoiser = self.model_state.denoiser
        in_forward = [(group, group.evaluated(rows)) for group, rows in step.split(hidden) if group.num_nodes]
        if in_forward:
            groups, evaluated = zip(*in_forward, strict=True)
            yield from zip(groups, denoiser.advance(evaluated), strict=True)
        yield from ((group, denoiser.finished(group.blocks)) for group in step.groups if not group.num_nodes)

    def _profile(self, hidden: Tensor, input_batch: InputBatch) -> SamplerOutput:
        """Use as much memory as a real step can, for the run in which vLLM measures it; the result is not used."""
        denoiser = self.model_state.denoiser
        num_rows = min(denoiser.head.chunk_rows, self.model_state.max_num_tokens)
        denoiser.reduce(hidden[:1].expand(num_rows, -1).contiguous(), is_sampled=True)
        none = torch.zeros(input_batch.num_reqs, dtype=torch.int32, device=hidden.device)
        return _output(none[:, None], none, none, None)


def _report(step: DenoiseStep, group: Group, done: Trajectory) -> Tensor:
    """Put together what a step did for each request of a group; [num_reqs, REPORT_LEN] int64."""
    nodes = group.nodes
    assert nodes is not None, "the forward ran on them"
    report = torch.zeros(len(nodes.canvas), REPORT_LEN, dtype=torch.int64, device=nodes.canvas.device)
    is_masked = nodes.is_masked[:, 0].any(1)
    report[:, Column.FORWARDS] = is_masked | done.came_over
    report[:, Column.REFRESHES] = step.num_refreshes[group.index]
    report[:, Column.UNMASKED] = step.num_unmasked[group.index] + done.num_unmasked
    report[:, Column.ACCEPTED] = done.num_accepted
    report[:, Column.FINISHED] = done.is_finished
    report[:, Column.STORED] = group.blocks.start + done.came_over * group.block_length
    report[:, Column.COMMITS] = int(group.commits)
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
