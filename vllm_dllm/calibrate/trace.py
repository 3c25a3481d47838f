"""What a decoder without drafts did, step by step: the material of a calibration."""

import base64
import io
import zipfile
import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class BlockTrace:
    """One block from all masked to none; step s made canvas s + 1 of canvas s.

    Attributes:
        start: absolute position of the block.
        canvas: [num_steps + 1, block_length] int32.
        token_ids: [num_steps, block_length, num_candidates] int32, the most probable tokens of the step's distribution.
        log_probs: [num_steps, block_length, num_candidates] float64, of these tokens, descending.
    """

    start: int
    canvas: NDArray[np.int32]
    token_ids: NDArray[np.int32]
    log_probs: NDArray[np.float64]

    @property
    def num_steps(self) -> int:
        """Steps from the first canvas to the last."""
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class PromptTrace:
    """The blocks that one prompt's generation decoded, in order.

    Attributes:
        prompt_idx: place of the prompt in its file, from 0.
        seed: of the request's noise.
        blocks: as decoded.
    """

    prompt_idx: int
    seed: int
    blocks: tuple[BlockTrace, ...]


_FIELDS = ("canvas", "token_ids", "log_probs")
_DAMAGE = (ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""What reading a damaged text raises."""


def pack(trace: PromptTrace) -> str:
    """Write a trace as text without line ends."""
    arrays = {f"{field}{i}": getattr(block, field) for i, block in enumerate(trace.blocks) for field in _FIELDS}
    starts = np.array([block.start for block in trace.blocks])
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer, allow_pickle=False, head=np.array([trace.prompt_idx, trace.seed]), start=starts, **arrays
    )
    return base64.b64encode(buffer.getvalue()).decode()


def unpack(text: str) -> PromptTrace:
    """Read what `pack` wrote.

    Raises: ValueError for any other text.
    """
    try:
        with np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False) as arrays:
            blocks = tuple(
                BlockTrace(int(start), *(arrays[f"{field}{i}"] for field in _FIELDS))
                for i, start in enumerate(arrays["start"])
            )
            prompt_idx, seed = map(int, arrays["head"])
    except _DAMAGE as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    return PromptTrace(prompt_idx, seed, blocks)
