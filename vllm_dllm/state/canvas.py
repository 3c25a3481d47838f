"""The blocks being denoised and the parameters of their requests, as slot-indexed tensors.

A slot belongs to a request from `add_request` until the runner gives it to another one. Parameters are written on the
host and copied by `apply_staged_writes`, two copies for all of them; the canvases live on the device alone.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vllm_dllm import noise
from vllm_dllm.unmask.policy import POLICY_IDS, PolicyParams, choose_positions
from vllm_dllm.unmask.stats import RowSampling, RowStats


@dataclass(frozen=True, slots=True)
class RequestParams:
    """What a request asked for, resolved: no value is missing."""

    policy_id: int
    threshold: float
    factor: float
    steps_per_block: int
    row_len: int  # prompt and generation, in positions
    temperature: float
    top_k: int  # 0 keeps all
    top_p: float
    seed: int  # any 64-bit signed value


_INTS = ("policy_id", "steps_per_block", "row_len", "top_k", "seed")
_FLOATS = ("threshold", "factor", "temperature", "top_p")


class CanvasState:
    """Canvases and parameters of up to `max_num_reqs` requests."""

    def __init__(self, max_num_reqs: int, block_length: int, mask_token_id: int, device: torch.device) -> None:
        self.block_length = block_length
        self.mask_token_id = mask_token_id
        self.device = device
        # [max_num_reqs, block_length]: the active block; the mask token where is_masked.
        self.canvas = torch.full((max_num_reqs, block_length), mask_token_id, dtype=torch.int64, device=device)
        self.is_masked = torch.ones(max_num_reqs, block_length, dtype=torch.bool, device=device)
        self.step = torch.zeros(max_num_reqs, dtype=torch.int64, device=device)  # [max_num_reqs] within the block
        # Pinned for a GPU, so that the copy does not wait. Nobody writes meanwhile: the scheduler is synchronous.
        is_pinned = device.type == "cuda"
        self._ints_host = torch.zeros(len(_INTS), max_num_reqs, dtype=torch.int64, pin_memory=is_pinned)
        self._floats_host = torch.zeros(len(_FLOATS), max_num_reqs, dtype=torch.float64, pin_memory=is_pinned)
        self._ints_np, self._floats_np = self._ints_host.numpy(), self._floats_host.numpy()
        self._ints = torch.zeros_like(self._ints_host, device=device)
        self._floats = torch.zeros_like(self._floats_host, device=device)
        self._is_staged = False
        self._stream = torch.tensor(noise.STREAM, device=device)

    def add_request(self, slot: int, params: RequestParams) -> None:
        """Stage a request's parameters; its canvas is masked by `reset` when its first block begins."""
        self._ints_np[:, slot] = [getattr(params, name) for name in _INTS]
        self._floats_np[:, slot] = [getattr(params, name) for name in _FLOATS]
        self._is_staged = True

    def apply_staged_writes(self) -> None:
        """Copy the parameters staged since the last call to the device."""
        if self._is_staged:
            self._ints.copy_(self._ints_host, non_blocking=True)
            self._floats.copy_(self._floats_host, non_blocking=True)
            self._is_staged = False

    @property
    def row_len(self) -> Tensor:
        """[max_num_reqs] int64, positions of the prompt and the whole generation."""
        return self._int("row_len")

    @property
    def row_len_np(self) -> np.ndarray:
        """[max_num_reqs] int64 on the host."""
        row: np.ndarray = self._ints_np[_INTS.index("row_len")]
        return row

    def policy_params(self, slots: Tensor) -> PolicyParams:
        """Gather the policies of the given slots."""
        return PolicyParams(
            policy_id=self._int("policy_id")[slots],
            threshold=self._float("threshold")[slots],
            factor=self._float("factor")[slots],
            steps_per_block=self._int("steps_per_block")[slots],
        )

    def sampling_params(self, slots: Tensor, slots_np: np.ndarray, block_start: Tensor) -> RowSampling:
        """Gather the sampling parameters of every row of the given slots' blocks.

        Args:
            slots: [num_reqs] int64 on the device.
            slots_np: the same on the host, for the questions that decide which stages run.
            block_start: [num_reqs] int64, absolute position of each block.

        Returns: rows in the order of `slots`, block_length each.
        """
        temperature_np = self._floats_np[_FLOATS.index("temperature")][slots_np]
        has_top_k = self._ints_np[_INTS.index("top_k")][slots_np] > 0
        has_top_p = self._floats_np[_FLOATS.index("top_p")][slots_np] < 1
        return RowSampling(
            temperature=self._per_row(self._float("temperature")[slots]),
            top_k=self._per_row(self._int("top_k")[slots]),
            top_p=self._per_row(self._float("top_p")[slots]),
            keys=self.noise_keys(slots, block_start).flatten(),
            has_noise=bool((temperature_np > 0).any()),
            has_filter=bool(((temperature_np > 0) & (has_top_k | has_top_p)).any()),
        )

    def noise_keys(self, slots: Tensor, block_start: Tensor) -> Tensor:
        """Return the noise streams of each position for the step that follows the present canvases.

        Args:
            slots: [num_reqs] int64.
            block_start: [num_reqs] int64, absolute position of each block.

        Returns: [num_reqs, block_length] int64.
        """
        positions = block_start[:, None] + torch.arange(self.block_length, device=self.device)
        num_masked = self.is_masked[slots].sum(1)
        return noise.stream_keys(self._int("seed")[slots][:, None], positions, num_masked[:, None])

    def unmask(self, slots: Tensor, keys: Tensor, stats: RowStats) -> None:
        """Advance the canvases of the given slots by one step of their policies.

        Args:
            slots: [num_reqs] int64, without repetition.
            keys: [num_reqs * block_length] int64, the rows' noise streams in this step.
            stats: of the same rows.
        """
        params = self.policy_params(slots)
        shape = (slots.shape[0], self.block_length)
        is_random = (params.policy_id == POLICY_IDS["random"])[:, None]
        uniform = noise.uniform(keys.view(shape), self._stream)
        confidence = torch.where(is_random, uniform, stats.confidence.view(shape))
        is_masked = self.is_masked[slots]
        chosen = choose_positions(confidence, is_masked, self.step[slots], params)
        self.canvas[slots] = torch.where(chosen, stats.token_ids.view(shape), self.canvas[slots])
        self.is_masked[slots] = is_masked & ~chosen
        self.step[slots] += 1

    def is_finished(self, slots: Tensor) -> Tensor:
        """Tell whose block has no masked position left; [num_reqs] bool."""
        return ~self.is_masked[slots].any(1)

    def reset(self, slots: Tensor, where: Tensor) -> None:
        """Begin a new block for those of the given slots that `where` marks.

        Args:
            slots: [num_reqs] int64, without repetition.
            where: [num_reqs] bool.
        """
        self.canvas[slots] = self.canvas[slots].masked_fill(where[:, None], self.mask_token_id)
        self.is_masked[slots] = self.is_masked[slots] | where[:, None]
        self.step[slots] = self.step[slots].masked_fill(where, 0)

    def _int(self, name: str) -> Tensor:
        return self._ints[_INTS.index(name)]

    def _float(self, name: str) -> Tensor:
        return self._floats[_FLOATS.index(name)]

    def _per_row(self, per_request: Tensor) -> Tensor:
        return per_request[:, None].expand(-1, self.block_length).flatten()
