"""EoTP of Learn2PD: a reply is cut where its end is seen; what is behind the cut is EOS and decided no more."""

from tests.statements.nets import accepted, learn2pd
from tests.statements.step import Step, best, even


def eotp(step: Step) -> list[int]:
    """As `static`, but by the step's number, and cut behind the masked position where EOS is the likeliest token with
    the most confidence.
    """
    counts = even(step.block.own, step.block.steps)
    count = max(counts[step.number], 1) if step.number < len(counts) else 1
    canvas = step.unmask(best(step.masked, {p: step.confidence(p) for p in step.masked}, count))
    return cut(step, canvas, surest_end(step))


def learn2pd_eotp(step: Step) -> list[int]:
    """As `learn2pd`, and cut behind the first EOS that the net takes for final, or else as `eotp`."""
    final = [p for p in accepted(step, step.options["learn2pd_eotp_accept"]) if step.token(p) == step.block.eos]
    return cut(step, learn2pd(step, "learn2pd_eotp_accept"), final[:1] or surest_end(step))


def surest_end(step: Step) -> list[int]:
    ends = [p for p in step.masked if step.token(p) == step.block.eos]
    return best(ends, {p: step.confidence(p) for p in ends}, 1)


def cut(step: Step, canvas: list[int], where: list[int]) -> list[int]:
    """Put EOS behind the leftmost cut of the block so far; all of a block that begins behind one."""
    request = step.memory["request"]
    if request.get("cut") and step.number == 0:
        return [step.block.eos] * step.block.length
    for position in where:
        request["cut"] = True
        step.memory["end"] = min(position + 1, step.memory.get("end", step.block.length))
    end = step.memory.get("end", step.block.length)
    return canvas[:end] + [step.block.eos] * (step.block.length - end)
