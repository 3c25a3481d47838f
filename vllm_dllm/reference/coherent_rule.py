"""CCD, the rule that looks at the step before."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from vllm_dllm.reference.rules import Canvas, Look, best, masked, write


@dataclass(slots=True)
class Ccd:
    """CCD (arXiv:2512.02044), tonyckc/CCD-DLM-code `_sample_inference_lookahead` with `seek_mode` and `alg="entropy"`.

    u is the whole share of a step of the block's positions, one at least (ours). The buffer has V positions at most:
    1 in steps 0 to 3, then one more each step up to u + int(u `ratio`); where a tenth of the positions or less are
    masked it begins with 1 again, so that it is 2. A step unmasks the u surest, those of least entropy. From step 5 on,
    but for the last: if any of these is in the buffer, those of the V surest that are in the buffer, and whose
    likeliest token is that of the step before, are unmasked in their place if they are u at least. The next buffer has
    the V surest of the others.
    """

    steps: int
    ratio: float = 4.0
    number: int = 0
    size: int = 1
    buffer: list[int] = field(default_factory=list)
    last: list[int] = field(default_factory=list)

    def step(self, canvas: Canvas, looks: Sequence[Look]) -> Canvas:
        """Return the next canvas."""
        places, scores = masked(canvas), [-look.entropy for look in looks]
        share = max(1, len(canvas) // self.steps)
        if len(places) <= 0.1 * len(canvas):
            self.size = 1
        self.size = 1 if self.number < 4 else min(self.size + 1, share + int(share * self.ratio))
        chosen = best(places, scores, share)
        if 5 <= self.number < self.steps - 1 and set(chosen) & set(self.buffer):
            surest = best(places, scores, self.size)
            stayed = [p for p in surest if p in self.buffer and looks[p].token == self.last[p]]
            chosen = stayed if len(stayed) >= share else chosen
        self.buffer = best([place for place in places if place not in chosen], scores, self.size)
        self.last = [look.token for look in looks]
        self.number += 1
        return write(canvas, looks, chosen)
