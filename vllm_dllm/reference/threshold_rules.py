"""Rules that unmask what is sure enough, and those that go by the number of the step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_dllm.reference.policy import static_counts
from vllm_dllm.reference.rules import Canvas, Look, best, masked, write


@dataclass(frozen=True, slots=True)
class LocalLeap:
    """LocalLeap (arXiv:2510.07081): positions near one that reaches the threshold need less.

    An anchor is a masked position of confidence >= `threshold`. A masked position within `radius` of an anchor needs
    `relaxed` only. Those that have what they need are unmasked, and the surest position in any case.
    """

    threshold: float = 0.9
    relaxed: float = 0.75
    radius: int = 4

    def step(self, canvas: Canvas, looks: Sequence[Look]) -> Canvas:
        """Return the next canvas."""
        places = masked(canvas)
        anchors = [place for place in places if looks[place].confidence >= self.threshold]
        chosen = best(places, [look.confidence for look in looks], 1) + anchors
        for place in places:
            is_near = any(abs(place - anchor) <= self.radius for anchor in anchors)
            if is_near and looks[place].confidence >= self.relaxed:
                chosen.append(place)
        return write(canvas, looks, chosen)


@dataclass(frozen=True, slots=True)
class EntropyThreshold:
    """dParallel (arXiv:2509.26488), czg1225/dParallel `get_transfer_index_entropy`.

    The position of least entropy is unmasked, and each whose entropy is not above `bound`.
    """

    bound: float = 0.5

    def step(self, canvas: Canvas, looks: Sequence[Look]) -> Canvas:
        """Return the next canvas."""
        places = masked(canvas)
        chosen = best(places, [-look.entropy for look in looks], 1)
        return write(canvas, looks, chosen + [place for place in places if looks[place].entropy <= self.bound])


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """dInfer's `HierarchyDecoder` (arXiv:2510.08666).

    Unmasked are: in each run of masked positions the surest one, if its confidence is above `low`; each position whose
    confidence is above `threshold`; and the surest of all.
    """

    threshold: float = 0.9
    low: float = 0.4

    def step(self, canvas: Canvas, looks: Sequence[Look]) -> Canvas:
        """Return the next canvas."""
        confidence = [look.confidence for look in looks]
        places = masked(canvas)
        chosen = best(places, confidence, 1) + [place for place in places if confidence[place] > self.threshold]
        runs: list[list[int]] = []
        for place in places:
            if not runs or runs[-1][-1] != place - 1:
                runs.append([])
            runs[-1].append(place)
        for run in runs:
            most = max(confidence[place] for place in run)
            chosen += [place for place in run if confidence[place] == most > self.low]
        return write(canvas, looks, chosen)


@dataclass(slots=True)
class EosLast:
    """LLaDA's `generate` (arXiv:2502.09992) with `confidence_eos_eot_inf`, at temperature 0.

    LLaDA's steps. Confidence is of the probabilities without EOS and EoT; a position whose likeliest token is one of
    them has 0.
    """

    steps: int
    end_ids: tuple[int, ...]
    step_index: int = 0

    def step(self, canvas: Canvas, looks: Sequence[Look]) -> Canvas:
        """Return the next canvas."""
        count = static_counts(len(canvas), self.steps)[self.step_index]
        self.step_index += 1
        scores = []
        for look in looks:
            left = look.probs.index_fill(0, torch.tensor(self.end_ids), 0.0)
            scores.append(float(left[look.token] / left.sum()))
        return write(canvas, looks, best(masked(canvas), scores, count))


@dataclass(slots=True)
class Eoser:
    """EOSER (arXiv:2509.23924), yjyddq/EOSER-ASS-RL `eoser_generate`.

    LLaDA's steps, S of each block. The confidence of a position whose likeliest token is EOS is multiplied by a factor
    that grows from `gamma_min` to `gamma_max` over the S x `num_blocks` steps of the generation; as published, those of
    a block are counted from 0 for it.
    """

    steps: int
    num_blocks: int
    eos_id: int
    gamma_min: float = 0.4
    gamma_max: float = 1.0
    step_index: int = 0

    def step(self, canvas: Canvas, looks: Sequence[Look]) -> Canvas:
        """Return the next canvas."""
        total = self.steps * self.num_blocks
        time = min(self.step_index, total - 1) / (total - 1) if total > 1 else 1.0
        count = static_counts(len(canvas), self.steps)[self.step_index]
        self.step_index += 1
        scores = less_of_eos(looks, self.eos_id, self.gamma_min + (self.gamma_max - self.gamma_min) * time)
        return write(canvas, looks, best(masked(canvas), scores, count))


@dataclass(slots=True)
class Ass:
    """ASS (arXiv:2509.23924), `ass_generate` and `eoser_ass_generate` with one block.

    S is the logarithm of the block's length, to the base of 2, rounded down. Step i unmasks 2^i positions, the last one
    the rest. With EOSER the factor of EOS grows with the share (2^(i + 1) - 1) / 2^S.
    """

    eos_id: int | None = None  # None: without EOSER
    gamma_min: float = 0.01
    gamma_max: float = 1.0
    step_index: int = 0

    def step(self, canvas: Canvas, looks: Sequence[Look]) -> Canvas:
        """Return the next canvas."""
        steps = max(1, int(math.log2(len(canvas))))
        count = 2**self.step_index if self.step_index < steps - 1 else len(canvas)
        time = (2 ** (self.step_index + 1) - 1) / 2**steps
        self.step_index += 1
        scores = [look.confidence for look in looks]
        if self.eos_id is not None:
            scores = less_of_eos(looks, self.eos_id, self.gamma_min + (self.gamma_max - self.gamma_min) * time)
        return write(canvas, looks, best(masked(canvas), scores, count))


def less_of_eos(looks: Sequence[Look], eos_id: int, factor: float) -> list[float]:
    """Return the confidence of positions, that of EOS times a factor."""
    return [look.confidence * (factor if look.token == eos_id else 1.0) for look in looks]
