"""EoTP of Learn2PD: a reply is cut where its end is seen; what is behind the cut is EOS and decided no more."""

from tests.statements.counted import static
from tests.statements.nets import accepted, learn2pd
from tests.statements.step import Step, best


def eotp(step: Step) -> list[int]:
    """As `static`, and cut behind the masked position where EOS is the likeliest token with the most confidence."""
    return cut(step, static(step), surest_end(step))


def learn2pd_eotp(step: Step) -> list[int]:
    """As `learn2pd`, and cut behind the first EOS that the net takes for final, or else as `eotp`."""
    final = [p for p in accepted(step, step.options["learn2pd_eotp_accept"]) if step.token(p) == step.block.eos]
    return cut(step, learn2pd(step, "learn2pd_eotp_accept"), final[:1] or surest_end(step))


def surest_end(step: Step) -> list[int]:
    ends = [p for p in step.masked if step.token(p) == step.block.eos]
    return best(ends, {p: step.confidence(p) for p in ends}, 1)


def cut(step: Step, canvas: list[int], where: list[int]) -> list[int]:
    """Put EOS behind the cut; all of a block that begins behind one."""
    request = step.memory["request"]
    if request.get("cut"):
        return [step.block.eos if token == step.block.mask else token for token in step.canvas]
    for position in where:
        request["cut"] = True
        step.memory["behind"] = position
        canvas = [canvas[p] if p <= position else step.block.eos for p in range(step.block.length)]
    return canvas
