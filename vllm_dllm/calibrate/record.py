"""Keep the traces of a calibration, so that one which was interrupted goes on where it was."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from vllm_dllm.calibrate.trace import BlockTrace, PromptTrace, pack, unpack
from vllm_dllm.errors import ConfigError

Settings = Mapping[str, object]
"""Everything that decides the traces, as JSON values."""


class TraceFile:
    """Traces of finished prompts: a line of settings, then a line for each prompt.

    Lines are appended; one that an interruption cut short is dropped when the file is opened again.

    Args:
        path: beside the graph's file.
        settings: of this calibration.

    Raises: ConfigError when the file has the traces of other settings, has a damaged line, or cannot be read or
        written.
    """

    def __init__(self, path: Path, settings: Settings) -> None:
        self.path = path
        self.traces: dict[int, PromptTrace] = {}
        head = json.dumps({"settings": settings}, sort_keys=True)
        try:
            lines = path.read_text("utf-8").split("\n") if path.exists() else []
            complete = lines[:-1]  # what follows the last line end was cut short
            if complete:
                _check_settings(path, complete[0], settings)
                self.traces = _unpack_all(path, complete[1:])
            temporary = path.with_name(path.name + ".new")
            temporary.write_text("".join(f"{line}\n" for line in complete or [head]), "utf-8")
            temporary.replace(path)
            self._file = path.open("a", encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"traces file {path} cannot be used ({error}); give another output") from None

    def append(self, trace: PromptTrace) -> None:
        """Keep the trace of a finished prompt, on the disk when this returns."""
        self.traces[trace.prompt_idx] = trace
        self._file.write(pack(trace) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def remove(self) -> None:
        """Delete the file."""
        self._file.close()
        self.path.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Close the file."""
        self._file.close()


def _unpack_all(path: Path, lines: Sequence[str]) -> dict[int, PromptTrace]:
    traces = {}
    for number, line in enumerate(lines, start=2):
        try:
            trace = unpack(line)
        except ValueError as error:
            raise ConfigError(
                f"{path}, line {number} is damaged ({error}); remove this line to decode its prompt again, or delete "
                "the file to begin anew"
            ) from None
        traces[trace.prompt_idx] = trace
    return traces


def _check_settings(path: Path, head: str, settings: Settings) -> None:
    try:
        found = json.loads(head)["settings"]
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{path} is not a file of traces; delete it or give another output") from None
    wanted = json.loads(json.dumps(settings))
    differing = [key for key in wanted | found if wanted.get(key) != found.get(key)]
    if differing:
        key = differing[0]
        raise ConfigError(
            f"{path} holds the traces of a calibration with {key} {found.get(key)!r}, but now {key} is "
            f"{wanted.get(key)!r}; run it with the same settings to go on, or delete the file to begin anew"
        )


class BlockRecorder:
    """Put the steps that an engine reports together into blocks.

    Args:
        mask_token_id: what a masked position holds.
        on_block: takes each finished block with the slot of its request.
    """

    def __init__(self, mask_token_id: int, on_block: Callable[[int, BlockTrace], None]) -> None:
        self._mask_token_id = mask_token_id
        self._on_block = on_block
        self._steps: dict[int, list[_Step]] = {}

    def observe(self, slot: int, start: int, step: "_Step") -> None:
        """Take a step of the request in a slot; one that does not go on from the last one begins a block.

        So does the first step after a preemption, which begins its block anew. A step of a finished canvas, as after a
        refresh that unmasked all of a block, is none.

        Args:
            slot: of the request.
            start: absolute position of its block.
            step: canvas before it, canvas after it, candidates' ids and log probabilities, as in `BlockTrace`.
        """
        before, after = step[:2]
        if not (before == self._mask_token_id).any():
            return
        steps = self._steps.setdefault(slot, [])
        if steps and (steps[-1][1] != before).any():
            steps.clear()
        steps.append(step)
        if not (after == self._mask_token_id).any():
            canvas = np.stack([steps[0][0], *(step[1] for step in steps)]).astype(np.int32)
            ids, log_probs = np.stack([step[2] for step in steps]), np.stack([step[3] for step in steps])
            del self._steps[slot]
            self._on_block(slot, BlockTrace(start, canvas, ids.astype(np.int32), log_probs))


_Step = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]
