"""Rules that decide a part of the block at a time, and the one that ends it early.

Ours: a part ends with the served block, whose positions all see each other anew in each step.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_dllm.reference.policy import static_counts
from vllm_dllm.reference.rules import Canvas, Look, best, masked, write


def reaching(canvas: Canvas, looks: Sequence[Look], end: int, threshold: float) -> list[int]:
    """Return the masked places before `end` that reach the threshold, or the surest of them."""
    places = [place for place in masked(canvas) if place < end]
    sure = [place for place in places if looks[place].confidence >= threshold]
    return sure or best(places, [look.confidence for look in looks], 1)


@dataclass(slots=True)
class AdaBlock:
    """AdaBlock (arXiv:2509.26432), lgxi24/AdaBlock-dLLM `compute_block_length` and the threshold rule.

    Where a part begins, the next int(`ahead` times the generation's length) places are looked at. If a delimiter is the
    likeliest token of any, and the confidence of the surest of these reaches `sure`, the part ends with it; else it has
    `length` positions.
    """

    gen_length: int
    threshold: float = 0.9
    delimiter: int = 198
    sure: float = 0.3
    length: int = 32
    ahead: float = 0.25
    end: int = 0

    def step(self, canvas: Canvas, looks: Sequence[Look]) -> Canvas:
        """Return the next canvas."""
        begin = masked(canvas)[0]
        if begin >= self.end:
            window = range(begin, min(begin + int(self.ahead * self.gen_length), len(canvas)))
            delimiters = [place for place in window if looks[place].token == self.delimiter]
            first = best(delimiters, [look.confidence for look in looks], 1)
            if first and looks[first[0]].confidence >= self.sure:
                self.end = first[0] + 1
            else:
                self.end = min(begin + int(self.length), len(canvas))
        return write(canvas, looks, reaching(canvas, looks, self.end, self.threshold))


@dataclass(slots=True)
class Deferred:
    """Deferred Commitment Decoding (arXiv:2601.02076), shuyingte/DCD `window_bidirectional_decode`, "sliding".

    A step unmasks, before the window's end, what reaches the threshold, at least one. Then the window begins with the
    first masked place, and its end moves so that `width` are masked in it, or it has `most` positions. Ours: an EOS
    ends nothing here; whoever takes the tokens trims there.
    """

    threshold: float = 0.9
    width: int = 16
    most: int = 128
    end: int = 0

    def step(self, canvas: Canvas, looks: Sequence[Look]) -> Canvas:
        """Return the next canvas."""
        if self.end == 0:
            self.end = min(masked(canvas)[0] + int(self.width), len(canvas))
        after = write(canvas, looks, reaching(canvas, looks, self.end, self.threshold))
        left = masked(after)
        begin = left[0] if left else len(canvas)
        num_left = sum(place < self.end for place in left)
        self.end = min(self.end + int(self.width) - num_left, begin + int(self.most), len(canvas))
        return after


@dataclass(slots=True)
class Prophet:
    """Prophet (arXiv:2508.19982).

    The gap of a place is the logit of its likeliest token less that of the second. If the mean gap of the answer's
    places reaches what the share of the steps that are done asks for, all is unmasked; else LLaDA's count.
    """

    steps: int
    gap_early: float = 7.5
    gap_middle: float = 5.0
    gap_late: float = 2.5
    begin: int = 0  # of the answer, behind the block's begin
    length: int = 0  # 0: to the end
    step_index: int = 0

    def step(self, canvas: Canvas, looks: Sequence[Look]) -> Canvas:
        """Return the next canvas."""
        progress = self.step_index / self.steps
        needed = self.gap_early if progress < 0.33 else self.gap_middle if progress < 0.67 else self.gap_late
        end = self.begin + self.length if self.length else len(canvas)
        gaps = [_gap(look) for look in looks[max(0, int(self.begin)) : max(0, int(end))]]
        if gaps and sum(gaps) / len(gaps) >= needed:
            return write(canvas, looks, masked(canvas))
        count = static_counts(len(canvas), self.steps)[self.step_index]
        self.step_index += 1
        return write(canvas, looks, best(masked(canvas), [look.confidence for look in looks], count))


@dataclass(frozen=True, slots=True)
class Learn2Pd:
    """Learn2PD (arXiv:2509.25188): a net looks at the probabilities of the likeliest tokens of all places.

    It has two layers, with what is negative between them cut off. A masked place is written where the logistic function
    of its output is above `accept`, and so is the surest one.
    """

    weight1: list[list[float]]
    bias1: list[float]
    weight2: list[list[float]]
    bias2: list[float]
    accept: float = 0.96

    def step(self, canvas: Canvas, looks: Sequence[Look]) -> Canvas:
        """Return the next canvas."""
        final = self.output(looks)
        chosen = [place for place in masked(canvas) if final[place] > self.accept]
        return write(canvas, looks, chosen + best(masked(canvas), [look.confidence for look in looks], 1))

    def output(self, looks: Sequence[Look]) -> list[float]:
        """Return what the net says of all places."""
        hidden = [max(0.0, value) for value in _layer(self.weight1, self.bias1, [look.confidence for look in looks])]
        return [1 / (1 + math.exp(-value)) for value in _layer(self.weight2, self.bias2, hidden)]


def _layer(weight: list[list[float]], bias: list[float], values: Sequence[float]) -> list[float]:
    return [
        b + sum(w * value for w, value in zip(row, values, strict=True)) for row, b in zip(weight, bias, strict=True)
    ]


def _gap(look: Look) -> float:
    first, second = look.probs.topk(2).values.tolist()
    return math.log(first) - math.log(second)
