"""What happens after a forward: statistics, unmasking, emission of finished blocks."""

from collections.abc import Callable
from itertools import count
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from vllm_dllm import noise, ops
from vllm_dllm.errors import KernelUnavailable
from vllm_dllm.unmask.stats import RowSampling, RowStats, Uniform, chunk_rows, row_stats

if TYPE_CHECKING:
    from vllm_dllm.engine.model_state import DllmModelState


logger = init_logger("vllm.dllm")


def choose_uniform(device: torch.device) -> Uniform:
    """Take the native noise op where it is built for the device, else its torch twin; the numbers are the same."""
    try:
        ops.require("counter_uniform", device.type)
    except KernelUnavailable as error:
        logger.warning("Noise is drawn by torch: %s", error)
        return noise.uniform_rows
    logger.info("Noise is drawn by the native op for %s.", device.type)
    return ops.counter_uniform


class DllmSampler:
    """Stands where the runner expects vLLM's sampler."""

    # The runner reads this for its token counts; None means that it keeps none.
    penalties_state = SimpleNamespace(output_bin_counts=None)

    def __init__(self, model_state: "DllmModelState", head_logits: Callable[[Tensor], Tensor], vocab_size: int) -> None:
        self.model_state = model_state
        self.head_logits = head_logits
        self.chunk_rows = chunk_rows(vocab_size)
        self.draw_uniform = choose_uniform(model_state.device)

    def add_request(self, req_idx: int, sampling_params: Any) -> None:
        """Do nothing: the model state keeps all parameters."""

    def apply_staged_writes(self) -> None:
        """Do nothing: the model state keeps all parameters."""

    def __call__(self, hidden: Tensor, input_batch: InputBatch) -> SamplerOutput:
        """Advance every denoising request by one step and emit the blocks that are now finished.

        Args:
            hidden: [num_denoising * block_length, hidden_size], what the model's `compute_logits` hands on.
            input_batch: the step's batch.

        Returns: `num_sampled` is block_length for a finished block and 0 otherwise; `num_rejected` is the rest of the
            rows that a denoising request was scheduled, so that both vLLM's counts advance by finished blocks alone.
        """
        step = self.model_state.step_of(input_batch)
        if step is None:
            return self._profile(hidden, input_batch)
        state, num_reqs = self.model_state.state, step.num_reqs
        sampled = torch.zeros(input_batch.num_reqs, state.block_length, dtype=torch.int32, device=hidden.device)
        num_sampled = torch.zeros(input_batch.num_reqs, dtype=torch.int32, device=hidden.device)
        num_rejected = torch.zeros_like(num_sampled)
        if num_reqs > 0:
            params = state.sampling_params(step.slots, step.slots_np, step.block_start)
            state.unmask(step.slots, params.keys, self._row_stats(hidden, params))
            is_finished = state.is_finished(step.slots)
            sampled[:num_reqs] = state.canvas[step.slots]
            num_sampled[:num_reqs] = is_finished * state.block_length
            num_rejected[:num_reqs] = state.block_length - num_sampled[:num_reqs]
            state.reset(step.slots, is_finished)
        begins = input_batch.idx_mapping[num_reqs : input_batch.num_reqs]
        state.reset(begins, torch.ones_like(begins, dtype=torch.bool))
        return _output(sampled, num_sampled, num_rejected)

    def _row_stats(self, hidden: Tensor, params: RowSampling) -> RowStats:
        """Make the head product chunk by chunk and keep what the policies need of each row."""
        mask_token_id = self.model_state.state.mask_token_id
        parts = [
            row_stats(self.head_logits(rows), params.rows(begin, begin + len(rows)), mask_token_id, self.draw_uniform)
            for begin, rows in zip(count(0, self.chunk_rows), hidden.split(self.chunk_rows), strict=False)
        ]
        return RowStats(torch.cat([p.token_ids for p in parts]), torch.cat([p.confidence for p in parts]))

    def _profile(self, hidden: Tensor, input_batch: InputBatch) -> SamplerOutput:
        """Use as much memory as a real step can, for the run in which vLLM measures it; the result is not used."""
        num_rows = min(self.chunk_rows, self.model_state.max_num_tokens)
        zeros = torch.zeros(num_rows, dtype=torch.int64, device=hidden.device)
        params = RowSampling(
            temperature=torch.ones(num_rows, dtype=torch.float64, device=hidden.device),
            top_k=zeros,
            top_p=torch.full((num_rows,), 0.9, dtype=torch.float64, device=hidden.device),
            keys=zeros,
            has_noise=True,
            has_filter=True,
        )
        rows = hidden[:1].expand(num_rows, -1).contiguous()
        row_stats(self.head_logits(rows), params, self.model_state.state.mask_token_id, self.draw_uniform)
        none = torch.zeros(input_batch.num_reqs, dtype=torch.int32, device=hidden.device)
        return _output(none[:, None], none, none)


def _output(sampled: Tensor, num_sampled: Tensor, num_rejected: Tensor) -> SamplerOutput:
    return SamplerOutput(
        sampled_token_ids=sampled,
        logprobs_tensors=None,
        num_nans=None,
        num_sampled=num_sampled,
        num_rejected=num_rejected,
    )
