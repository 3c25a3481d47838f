"""The worker's part of the check of state (`engine.state_check`): what only the worker knows."""

import os
from enum import IntEnum, IntFlag
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vllm_dllm.errors import ConfigError, StateError
from vllm_dllm.state.report import Column

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.input_batch import InputBatch

VARIABLE = "VLLM_DLLM_CHECK"


class CheckLevel(IntEnum):
    """When state is checked, as the variable says."""

    OFF = 0
    IDLE = 1
    STEP = 2


def check_level() -> CheckLevel:
    """Read the variable. Raises: ConfigError."""
    given = os.environ.get(VARIABLE, "0")
    levels = {"": CheckLevel.OFF, "0": CheckLevel.OFF, "idle": CheckLevel.IDLE, "1": CheckLevel.STEP}
    if given not in levels:
        raise ConfigError(
            f"{VARIABLE} is {given!r}; allowed are '0' for no check, 'idle' for one when the engine goes idle and '1' "
            "for one after every step besides; set one of these or unset it"
        )
    return levels[given]


class Fault(IntFlag):
    """What a canvas may not be."""

    UNKNOWN_ID = 1  # a token that the vocabulary does not have
    NO_MASK = 2  # finished, though its block was not emitted


class WorkerCheck:
    """What a worker compares with the scheduler's roster (`report.StepOrder`), and adds to its reports.

    Args:
        runner: vLLM's.
    """

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self.reports_state = check_level() == CheckLevel.STEP

    def compare(self, roster: frozenset[str]) -> None:
        """Compare the slots with the requests that should be in them, when requests were added and removed.

        Raises: StateError naming a request.
        """
        states = self._runner.req_states
        held: dict[str, int] = states.req_id_to_index
        for request in sorted(held.keys() ^ roster):
            if request in held:
                raise StateError(
                    f"request {request} is in slot {held[request]} of the worker, but does not run in the scheduler"
                )
            raise StateError(f"request {request} runs in the scheduler, but is in no slot of the worker")
        by_slot: dict[int, str] = {}
        for request, slot in held.items():
            if slot in by_slot:
                raise StateError(f"requests {by_slot[slot]} and {request} are in the same slot {slot} of the worker")
            by_slot[slot] = request
        for slot in sorted(states.free_indices):
            if slot in by_slot:
                raise StateError(f"slot {slot} of the worker is free, but request {by_slot[slot]} is in it")
        if len(states.free_indices) + len(held) != states.max_num_reqs:
            raise StateError(
                f"{len(states.free_indices)} slots of the worker are free and {len(held)} taken, but it has "
                f"{states.max_num_reqs}"
            )

    def with_state(self, report: Tensor, batch: "InputBatch") -> Tensor:
        """Add to a report the faults of the canvases, and behind it each request's number of pages and pages.

        Args:
            report: [num_reqs, n] int32.
            batch: that was just sampled.

        Returns: [num_reqs, n + 1 + max_pages] int32.
        """
        slots, tables = batch.idx_mapping[: batch.num_reqs], self._runner.block_tables
        report[:, Column.FAULTS] |= self._faults(slots, batch.idx_mapping_np[: batch.num_reqs])
        num_pages = torch.from_numpy(tables.num_blocks.np[0, batch.idx_mapping_np[: batch.num_reqs]].copy())
        return torch.cat([report, num_pages.to(report)[:, None], tables.block_tables[0].gpu[slots].to(report)], 1)

    def _faults(self, slots: Tensor, slots_np: np.ndarray) -> Tensor:
        """Look at the canvases that the step leaves behind; [num_reqs] int32."""
        state = self._runner.model_state.state
        canvas = state.canvas[slots]
        vocab_size = self._runner.model_config.get_vocab_size()
        is_masked = canvas == state.mask_token_id
        is_unknown = ((canvas < 0) | (canvas >= vocab_size)) & ~is_masked
        # A window that was drafted is not emitted before it is verified.
        # One that slides is emitted as far as it is known.
        is_full = ~is_masked.any(1) & (self._runner.model_state.settings.mode != "self_speculation")
        is_full &= torch.from_numpy(~state.apart.may_edit(slots_np)).to(is_full.device)
        return is_unknown.any(1).int() * Fault.UNKNOWN_ID + is_full.int() * Fault.NO_MASK
