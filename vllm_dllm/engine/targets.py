"""Requests whose block is scored (`state.targets`): how a front end tells workers and scheduler so."""

from dataclasses import dataclass
from typing import Any

from vllm.sampling_params import SamplingParams

from vllm_dllm.blocks import RowBlocks, row_blocks
from vllm_dllm.config import DllmConfig
from vllm_dllm.engine import pins
from vllm_dllm.engine.refusals import reserved

SENT = "vllm_dllm_targets"
"""The key of `extra_args` for the tokens; nobody but `engine.scoring` may set it, which JSON cannot say."""


@dataclass(frozen=True, slots=True)
class Targets:
    """What a front end asks of a request, in place of the token ids that are sent."""

    behind: list[int]  # the sequence behind the prompt, `OPEN` where it is masked
    tokens: list[int]  # of its block


def put_targets_in(params: SamplingParams) -> None:
    """Put what a request is scored by into its parameters, and its sequence as pins. Raises: RequestError."""
    args = params.extra_args or {}
    asked = args.get(SENT)
    if asked is None:
        return
    if not isinstance(asked, Targets):
        raise reserved(SENT)
    params.extra_args = {
        "dllm_policy": "static",
        "dllm_speculation": False,
        SENT: asked.tokens,
        pins.SENT: asked.behind,
    }


def targets_of(params: SamplingParams | None) -> tuple[int, ...] | None:
    """Return what an admitted request's block is scored by; None: it is decoded."""
    found: Any = ((params and params.extra_args) or {}).get(SENT)
    return None if found is None else tuple(found)


def blocks_of(
    params: SamplingParams | None, prompt_len: int, max_tokens: int | None, settings: DllmConfig, max_model_len: int
) -> RowBlocks:
    """Return where the blocks of a request lie, see `row_blocks`: with its pins, and no further where it is scored."""
    length, is_exact = pins.answer_length(params, max_tokens), targets_of(params) is not None
    return row_blocks(prompt_len, length, settings, max_model_len, is_exact=is_exact)
