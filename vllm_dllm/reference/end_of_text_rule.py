"""EoTP (arXiv:2509.25188), ims-kdks/Learning-to-Parallel-Decoding `generate_predict_eot` and `get_transfer_index`.

The published sequence gets shorter. Ours: what is cut holds EOS, which the model sees, and the reply ends before it.
Behind a cut the published net sees zeros.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vllm_dllm.reference.policy import static_counts
from vllm_dllm.reference.rules import Canvas, Look, best, masked, write
from vllm_dllm.reference.window_rules import Learn2Pd


@dataclass(slots=True)
class Reply:
    """What the blocks of a reply share."""

    is_over: bool = False


@dataclass(slots=True)
class _Cutting:
    reply: Reply
    eos_id: int
    end: int | None = None  # places of the block that are left
    number: int = 0  # of the step

    def begin(self, canvas: Canvas) -> bool:
        """Say whether the block lies behind a cut, as it begins."""
        if self.end is None:
            self.end = 0 if self.reply.is_over else len(canvas)
        self.number += 1
        return self.end == 0

    def cut(self, before: Canvas, after: Canvas, looks: Sequence[Look], believed: Sequence[int]) -> Canvas:
        """Return a canvas with EOS behind the cut, which comes behind the first believed EOS or else the surest."""
        ends = [place for place in masked(before) if looks[place].token == self.eos_id]
        found = [place for place in ends if place in believed][:1]
        found = found or best(ends, [look.confidence for look in looks], 1)
        assert self.end is not None, "the block has begun"
        if found:
            self.reply.is_over, self.end = True, min(self.end, found[0] + 1)
        return after[: self.end] + [self.eos_id] * (len(after) - self.end)


class Eotp:
    """LLaDA's rule, and in each step a cut behind the surest masked place whose likeliest token is EOS."""

    def __init__(self, steps: int, reply: Reply, eos_id: int) -> None:
        self.steps, self._cutting = steps, _Cutting(reply, eos_id)

    def step(self, canvas: Canvas, looks: Sequence[Look]) -> Canvas:
        """Return the next canvas."""
        if self._cutting.begin(canvas):
            return [self._cutting.eos_id] * len(canvas)
        count = max(1, static_counts(len(canvas), self.steps)[self._cutting.number - 1])
        places = best(masked(canvas), [look.confidence for look in looks], count)
        return self._cutting.cut(canvas, write(canvas, looks, places), looks, ())


class Learn2PdEotp:
    """Learn2PD's rule, and a cut behind the first EOS that the net takes for final, or else as `Eotp`."""

    def __init__(self, reply: Reply, eos_id: int, **net: object) -> None:
        self._net, self._cutting = Learn2Pd(**net), _Cutting(reply, eos_id)  # type: ignore[arg-type]

    def step(self, canvas: Canvas, looks: Sequence[Look]) -> Canvas:
        """Return the next canvas."""
        if self._cutting.begin(canvas):
            return [self._cutting.eos_id] * len(canvas)
        end = self._cutting.end or 0
        shown = [replace(look, confidence=0.0) if place >= end else look for place, look in enumerate(looks)]
        output = self._net.output(shown)
        final = [place for place in masked(canvas) if output[place] > self._net.accept]
        places = final + best(masked(canvas), [look.confidence for look in looks], 1)
        return self._cutting.cut(canvas, write(canvas, looks, places), looks, final)
