"""What happens after a forward: canvases advance, finished blocks are emitted."""

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vllm_dllm.engine.worker_check import WorkerCheck
from vllm_dllm.state.records import EmittedLogprobs
from vllm_dllm.state.report import REPORT_LEN, with_canvases

if TYPE_CHECKING:
    from vllm.v1.outputs import LogprobsTensors
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.sample.output import SamplerOutput

    from vllm_dllm.engine.model_state import DllmModelState
    from vllm_dllm.engine.report import StepOrder


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

    def __call__(self, hidden: Tensor, input_batch: "InputBatch") -> "SamplerOutput":
        """Advance every denoising request and emit the blocks that are now finished, or what a window had verified.

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
        if step.plan.num_reqs == 0:  # prompts alone, which only vLLM's warm-up schedules so
            return self._nothing(hidden, input_batch)
        emitted = self.model_state.decide(step, hidden)
        self._report = emitted.report
        return _output(emitted.sampled, emitted.num_sampled, emitted.num_rejected, emitted.logprobs)

    def take_order(self, order: "StepOrder") -> None:
        """Take what the scheduler tells of the next step. Raises: StateError where its roster is not ours."""
        self.model_state.order = order
        # An id may be used again at once (vLLM makes ids unique only where its setting for that is left on).
        self.model_state.state.apart.forget([name for name in order.ended if name not in order.requests])
        if self.check and order.roster is not None:
            self.check.compare(order.roster)

    def take_rows(self, input_batch: "InputBatch") -> Tensor:
        """Return the report of the batch that was just sampled; [num_reqs, REPORT_LEN or more] int32."""
        report, self._report = self._report, None
        assert report is not None, "the runner samples a batch before it asks for the report"
        state, order = self.model_state.state, self.model_state.order
        if order is not None and order.shows_canvas:
            slots = input_batch.idx_mapping[: input_batch.num_reqs]
            report = with_canvases(report, self.model_state.shown(slots), state.records.kept(slots))
        return self.check.with_state(report, input_batch) if self.check and self.check.reports_state else report

    def _profile(self, hidden: Tensor, input_batch: "InputBatch") -> "SamplerOutput":
        """Use as much memory as a real step can, for the run in which vLLM measures it; the result is not used."""
        denoiser = self.model_state.denoiser
        num_rows = min(denoiser.head.chunk_rows, self.model_state.max_num_tokens)
        denoiser.reduce(hidden[:1].expand(num_rows, -1).contiguous(), is_sampled=True)
        return self._nothing(hidden, input_batch)

    def _nothing(self, hidden: Tensor, input_batch: "InputBatch") -> "SamplerOutput":
        """Emit and report nothing."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(input_batch.num_reqs, *shape, dtype=torch.int32, device=hidden.device)

        self._report = zeros(REPORT_LEN)
        return _output(zeros(self.model_state.block_length), zeros(), zeros())


def _output(
    sampled: Tensor, num_sampled: Tensor, num_rejected: Tensor, logprobs: EmittedLogprobs | None = None
) -> "SamplerOutput":
    """Return what a step emits as the runner takes it."""
    from vllm.v1.worker.gpu.sample.output import SamplerOutput  # here, so that decoding is imported without vLLM

    tensors = None if logprobs is None else _logprobs(logprobs, len(sampled))
    return SamplerOutput(sampled, tensors, None, num_sampled, num_rejected)


def _logprobs(emitted: EmittedLogprobs, num_batch: int) -> "LogprobsTensors":
    """Return log-probabilities as vLLM takes them: one behind the other, and where those of a request begin."""
    from vllm.v1.outputs import LogprobsTensors

    tokens, begin = emitted.tokens, np.zeros(num_batch + 1, dtype=np.int64)
    begin[emitted.place_np] = np.arange(len(emitted.place_np)) * tokens.ranks.shape[1]
    return LogprobsTensors(
        tokens.token_ids.flatten(0, 1), tokens.log_probs.flatten(0, 1), tokens.ranks.flatten(), begin.tolist()
    )
