"""Trajectories: in which step each token of a reply was written, and how likely it was then; docs/trajectories.md.

`StepRecorder` numbers the steps that a denoiser decides, `engine.trajectories` attaches one to an engine. A file of
trajectories is JSON lines, one reply a line, with the fields of `Trajectory`.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vllm_dllm.denoiser import Observation
from vllm_dllm.errors import ConfigError

GIVEN = -1
"""Stands for the step of a token that no step wrote: the request gave it (`dllm_canvas`)."""


@dataclass(frozen=True, slots=True)
class Trajectory:
    """A reply, and how it came to be; all lists but the prompt's have an entry of each of its tokens.

    Attributes:
        request: its id, as the engine's output has it.
        index: of the reply among the request's `n`.
        prompt_token_ids: of the request.
        token_ids: of the reply.
        block_start: where the token's block begins in the sequence, the prompt's first token being at 0. Blocks are
            decoded one after another; the first one may begin in the prompt.
        step: of its block, from 0, that wrote the token; tokens of one block with one step were written together.
            `GIVEN` where no step did. Where tokens change, the last one that wrote it.
        logprob: of the token in that step, as a reply's `logprobs` have it.
    """

    request: str
    index: int
    prompt_token_ids: list[int]
    token_ids: list[int]
    block_start: list[int]
    step: list[int]
    logprob: list[float]


def write_trajectories(path: Path, trajectories: Iterable[Trajectory]) -> None:
    """Write a file of trajectories; one that is there is replaced."""
    path.write_text("".join(json.dumps(asdict(each)) + "\n" for each in trajectories), "utf-8")


def read_trajectories(path: Path) -> list[Trajectory]:
    """Read what `write_trajectories` wrote.

    Raises: ConfigError for a line that is no trajectory.
    """
    return [_read(path, number, line) for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1)]


def _read(path: Path, number: int, line: str) -> Trajectory:
    allowed = [its.name for its in fields(Trajectory)]
    try:
        given = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{path}, line {number} is no JSON ({error}); remove it or write the file anew") from None
    if not isinstance(given, dict) or [*given] != allowed:
        raise ConfigError(f"{path}, line {number} is {line[:60]!r}, allowed is an object with {allowed}; remove it")
    return Trajectory(**given)


class StepRecorder:
    """Numbers the steps of each block, and notes which one wrote each position.

    A canvas that is not the one that the step before left begins its block anew: so do a block behind a preemption, and
    one behind a void step, which nobody reads.

    Args:
        request_of: names the request in a slot.
    """

    def __init__(self, request_of: Callable[[int], str]) -> None:
        self._request_of = request_of
        self._under_way: dict[str, _Block] = {}
        self._written: dict[str, dict[int, int]] = {}  # steps by position

    def observe(self, seen: Observation) -> None:
        """Take a forward; waits for the device."""
        nodes, done = seen.nodes, seen.done
        columns = (nodes.canvas[:, 0], nodes.canvas[:, -1], done.next_canvas, done.step)
        canvases = zip(*(column.cpu().numpy() for column in columns), strict=True)
        counts = (seen.blocks.start, done.num_steps, done.came_over)
        numbers = zip(*(column.tolist() for column in counts), strict=True)
        for slot, rows, its in zip(seen.blocks.slots_np.tolist(), canvases, numbers, strict=True):
            self._take(self._request_of(slot), _Forward(*rows, *its))

    def _take(self, request: str, its: "_Forward") -> None:
        written = self._written.setdefault(request, {})
        if its.num_steps == 0:  # of a full canvas, as behind a refresh that unmasked all of it
            return
        block = self._under_way.get(request)
        if block is None or block.start != its.start or (block.canvas != its.before).any():
            block = _Block(its.start, its.before)
        written |= block.add(its.after, its.step, its.num_steps)
        if its.came_over:  # the last step was the next block's first
            block = _Block(its.start + len(its.after), its.ahead)
            written |= block.add(its.after, np.where(its.after != its.ahead, 0, GIVEN), 1)
        self._under_way[request] = block

    def take(self, is_wanted: Callable[[str], bool]) -> dict[int, int]:
        """Return the steps by position of the request that is wanted, which has ended, and forget it.

        Raises: KeyError where no step of it was seen.
        """
        request = next((name for name in self._written if is_wanted(name)), None)
        if request is None:
            raise KeyError("no step was seen")
        self._under_way.pop(request, None)
        return self._written.pop(request)


@dataclass(frozen=True, slots=True)
class _Forward:
    """What a forward did for a request; canvases and steps are [block_length] int64."""

    before: NDArray[np.int64]
    ahead: NDArray[np.int64]  # the last node: the next block's begin, where that came true
    after: NDArray[np.int64]
    step: NDArray[np.int64]  # of this forward's, that wrote each position; below 0: none
    start: int  # of the block
    num_steps: int
    came_over: bool


@dataclass(slots=True)
class _Block:
    start: int
    canvas: NDArray[np.int64]  # behind its last step
    num_steps: int = 0

    def add(self, canvas: NDArray[np.int64], step: NDArray[np.int64], num_steps: int) -> dict[int, int]:
        """Take steps that left a canvas, and return those that wrote positions, by position: as `step` counts them."""
        wrote = {self.start + place: self.num_steps + own for place, own in enumerate(step.tolist()) if own >= 0}
        self.canvas, self.num_steps = canvas, self.num_steps + num_steps
        return wrote
