"""Rules that mask written positions again.

Ours: each block by itself, as published decoders do where there is one; and where fewer positions are masked than a
step wants, it takes those.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from vllm_dllm.reference.policy import static_counts
from vllm_dllm.reference.rules import Canvas, Look, best, masked, write


def erased(canvas: Canvas, places: Sequence[int]) -> Canvas:
    """Return a canvas where some places are masked."""
    return [None if place in places else token for place, token in enumerate(canvas)]


@dataclass(slots=True)
class Saber:
    """Saber (arXiv:2510.18165), zhaoyMa/Saber `generate_with_saber`.

    The threshold is the mean confidence of the places that were written so far, of each when it was written last, and 1
    where none was. A step writes the places above it, or the best `least`. Unless all are written then, it masks those
    written places again whose confidence, of the likeliest token there, grew least since the step before: an eighth of
    the number written, half of `least` at least, and less than were written.
    """

    least: int = 2
    written_at: dict[int, float] = field(default_factory=dict)
    last: dict[int, float] = field(default_factory=dict)

    def step(self, canvas: Canvas, looks: Sequence[Look]) -> Canvas:
        """Return the next canvas."""
        confidence = [look.confidence for look in looks]
        threshold = sum(self.written_at.values()) / len(self.written_at) if self.written_at else 1.0
        chosen = [place for place in masked(canvas) if confidence[place] > threshold]
        if len(chosen) < self.least:
            chosen = best(masked(canvas), confidence, int(self.least))
        gains = [now - self.last.get(place, 0.0) for place, now in enumerate(confidence)]
        self.last = dict(enumerate(confidence))
        self.written_at |= {place: confidence[place] for place in chosen}
        after = write(canvas, looks, chosen)
        if None not in after:
            return after
        num_fixed = int(max(self.least, len(chosen)))
        num_back = min(max(int(self.least / 2), (num_fixed + 7) // 8), num_fixed - 1)
        written = [place for place, token in enumerate(after) if token is not None]
        return erased(after, best(written, [-gain for gain in gains], num_back))


@dataclass(slots=True)
class Rcr:
    """RCR (MDPO, arXiv:2508.13148), as ParallelBench's `generate_rcr` has it with `overtime_conf` and mode "linear".

    Step i of S writes all masked places, and masks floor(B (1 - (i + 1) / S)) of the block again: those of the least
    confidence, of each when it was written last.
    """

    steps: int
    number: int = 0
    written_at: dict[int, float] = field(default_factory=dict)

    def step(self, canvas: Canvas, looks: Sequence[Look]) -> Canvas:
        """Return the next canvas."""
        self.number += 1
        self.written_at |= {place: looks[place].confidence for place in masked(canvas)}
        num_masked = math.floor(len(canvas) * max(1 - self.number / self.steps, 1e-6))
        least = [-self.written_at[place] for place in range(len(canvas))]
        return erased(write(canvas, looks, masked(canvas)), best(range(len(canvas)), least, num_masked))


@dataclass(slots=True)
class Remdm:
    """ReMDM (arXiv:2503.00307), as ParallelBench's `generate_remdm` has it.

    LLaDA's steps, S of them, with `loops` more behind seven eighths of a block's positions. Before each of these the
    `number` places of the least confidence, when they were written, are masked, and the step writes as many.
    """

    steps: int
    loops: int = 4
    number: int = 1
    step_index: int = 0
    written_at: dict[int, float] = field(default_factory=dict)

    def step(self, canvas: Canvas, looks: Sequence[Look]) -> Canvas:
        """Return the next canvas."""
        length = len(canvas)
        rewrites = [False] * self.steps
        first = max(min(int(length * 7 / 8), length - 1), 1)
        rewrites[first:first] = [True] * int(self.loops)
        counts = static_counts(length, self.steps)
        plan = [int(self.number) if rewrite else counts.pop(0) for rewrite in rewrites]
        chosen = best(masked(canvas), [look.confidence for look in looks], plan[self.step_index])
        self.written_at |= {place: looks[place].confidence for place in chosen}
        after = write(canvas, looks, chosen)
        self.step_index += 1
        if self.step_index == len(plan) or not rewrites[self.step_index]:
            return after
        least = [-self.written_at.get(place, math.inf) for place in range(length)]
        back = best([place for place in range(length) if after[place] is not None], least, int(self.number))
        for place in back:
            del self.written_at[place]
        return erased(after, back)
