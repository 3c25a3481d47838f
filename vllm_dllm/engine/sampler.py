"""What happens after a forward: canvases advance, finished blocks are emitted."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from vllm_dllm.engine.report import REPORT_LEN, StepFacts
from vllm_dllm.engine.step import DenoiseStep, Group
from vllm_dllm.engine.worker_check import WorkerCheck
from vllm_dllm.unmask.walk import Trajectory

if TYPE_CHECKING:
    from vllm_dllm.engine.model_state import DllmModelState


class DllmSampler:
    """Stands where the runner expects vLLM's sampler."""

    # The runner reads this for its token counts; None means that it keeps none.
    penalties_state = SimpleNamespace(output_bin_counts=None)

    def __init__(self, model_state: "DllmModelState") -> None:
        self.model_state = model_state
        self.check: WorkerCheck | None = None
        self._report: Tensor | None = None

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
            alone. The step's report stays for `take_rows`.
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
            report[: step.num_reqs][index] = _facts(step, group, done).rows()
            denoiser.begin_blocks(group.blocks.slots, done.is_finished & ~done.came_over)
            group.came_over = done.came_over if group.looks_ahead else None
        begins = input_batch.idx_mapping[step.num_reqs : input_batch.num_reqs]
        denoiser.begin_blocks(begins, torch.ones_like(begins, dtype=torch.bool))
        self._report = report
        return SamplerOutput(sampled, None, None, num_sampled, num_rejected)

    def take_rows(self, input_batch: InputBatch) -> Tensor:
        """Return the report of the batch that was just sampled; [num_reqs, REPORT_LEN or more] int32."""
        report, self._report = self._report, None
        assert report is not None, "the runner samples a batch before it asks for the report"
        return self.check.with_state(report, input_batch) if self.check and self.check.reports_state else report

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
        return SamplerOutput(none[:, None], None, None, none, none)


def _facts(step: DenoiseStep, group: Group, done: Trajectory) -> StepFacts:
    """Put together what a step did for each request of a group."""
    nodes = group.nodes
    assert nodes is not None, "the forward ran on them"
    is_masked = nodes.is_masked[:, 0].any(1)
    return StepFacts(
        forwards=is_masked | done.came_over,
        refreshes=step.num_refreshes[group.index],
        unmasked=step.num_unmasked[group.index] + done.num_unmasked,
        accepted=done.num_accepted,
        finished=done.is_finished,
        stored=group.blocks.start + done.came_over * group.block_length,
        wrote=step.num_stored[group.index] + (done.came_over + group.commits) * group.block_length,
        commits=int(group.commits),
        depth=nodes.depth[:, 1:],
        proposed=nodes.is_valid[:, 1:] & is_masked[:, None],
    )
