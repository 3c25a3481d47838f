"""Rules that unmask what is sure enough, and remember nothing."""

from collections.abc import Sequence
from dataclasses import dataclass

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
