"""What happens after a forward: canvases advance, finished blocks are emitted."""

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from vllm_dllm.engine.report import REPORT_LEN, StepFacts
from vllm_dllm.engine.step import Step
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
            hidden: [num_rows, hidden_size], those for the LM head, what the model's `compute_logits` hands on.
            input_batch: the step's batch.

        Returns: `num_sampled` is what was unknown of a finished block and 0 otherwise; `num_rejected` is the rest of
            the drafts that vLLM counts, so that its counts advance by finished blocks alone. The step's report stays
            for `take_rows`.
        """
        step = self.model_state.step_of(input_batch)
        if step is None:
            return self._profile(hidden, input_batch)
        num_reqs, num_steps = input_batch.num_reqs, step.plan.num_reqs
        state, denoiser = self.model_state.state, self.model_state.denoiser
        sampled = torch.zeros(num_reqs, state.block_length, dtype=torch.int32, device=hidden.device)
        num_sampled = torch.zeros(num_reqs, dtype=torch.int32, device=hidden.device)
        num_rejected = torch.zeros_like(num_sampled)
        self._report = torch.zeros(num_reqs, REPORT_LEN, dtype=torch.int32, device=hidden.device)
        if num_steps == 0:  # prompts alone, which only vLLM's warm-up schedules so
            return SamplerOutput(sampled, None, None, num_sampled, num_rejected)
        done = denoiser.advance(step.blocks, step.nodes, hidden, None if step.special is None else step.special.fresh)
        known = (step.num_known - step.blocks.start)[:, None]
        columns = torch.arange(state.block_length, device=hidden.device) + known
        sampled[:num_steps] = done.canvas.gather(1, columns.clamp(max=state.block_length - 1))
        num_sampled[:num_steps] = done.is_finished * (state.block_length - known[:, 0])
        num_rejected[:num_steps] = step.num_counted - num_sampled[:num_steps]
        self._report[:num_steps] = _facts(step, done).rows()
        denoiser.begin_blocks(step.blocks.slots, done.is_finished & ~done.came_over)
        step.came_over = done.came_over if step.nodes.end is not None else None
        return SamplerOutput(sampled, None, None, num_sampled, num_rejected)

    def take_rows(self, input_batch: InputBatch) -> Tensor:
        """Return the report of the batch that was just sampled; [num_reqs, REPORT_LEN or more] int32."""
        report, self._report = self._report, None
        assert report is not None, "the runner samples a batch before it asks for the report"
        return self.check.with_state(report, input_batch) if self.check and self.check.reports_state else report

    def _profile(self, hidden: Tensor, input_batch: InputBatch) -> SamplerOutput:
        """Use as much memory as a real step can, for the run in which vLLM measures it; the result is not used."""
        denoiser = self.model_state.denoiser
        num_rows = min(denoiser.head.chunk_rows, self.model_state.max_num_tokens)
        denoiser.reduce(hidden[:1].expand(num_rows, -1).contiguous(), is_sampled=True)
        none = torch.zeros(input_batch.num_reqs, dtype=torch.int32, device=hidden.device)
        return SamplerOutput(none[:, None], None, None, none, none)


def _facts(step: Step, done: Trajectory) -> StepFacts:
    """Put together what a step did for each request."""
    nodes, special = step.nodes, step.special
    is_masked = nodes.is_masked[:, 0].any(1)
    decides, none = is_masked | done.came_over, torch.zeros_like(is_masked)
    over = done.came_over * step.plan.block_length
    return StepFacts(
        forwards=decides if special is None else decides & ~special.refreshes,
        refreshes=none if special is None else special.refreshes,
        unmasked=done.num_unmasked,
        accepted=done.num_accepted,
        finished=done.is_finished,
        stored=step.blocks.start + over,
        wrote=over if special is None else special.num_stored + over,
        commits=none if special is None else special.commits,
        depth=nodes.depth[:, 1:],
        proposed=nodes.is_valid[:, 1:] & is_masked[:, None],
    )
