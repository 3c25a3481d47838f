"""Rules that unmask a number of positions which a schedule gives: LLaDA, Dream, SDAR, EOSER and ASS."""

import math

from tests.statements.step import Step, best, softmax


def static(step: Step) -> list[int]:
    """The most confident (LLaDA `low_confidence`)."""
    return step.unmask(best(step.masked, {p: step.confidence(p) for p in step.masked}, step.share()))


def random(step: Step) -> list[int]:
    """Those with the largest random number (LLaDA `random`)."""
    left = len(step.masked)
    return step.unmask(best(step.masked, {p: step.uniform(p, left) for p in step.masked}, step.share()))


def margin(step: Step) -> list[int]:
    """Those whose likeliest token is furthest ahead of the next (Dream `topk_margin`)."""
    return step.unmask(best(step.masked, {p: step.margin(p) for p in step.masked}, step.share()))


def entropy(step: Step) -> list[int]:
    """Those of the least entropy (Dream `entropy`)."""
    return step.unmask(best(step.masked, {p: -step.entropy(p) for p in step.masked}, step.share()))


def sequential(step: Step) -> list[int]:
    """The leftmost (SDAR)."""
    return step.unmask(step.masked[: step.share()])


def origin(step: Step) -> list[int]:
    """Dream `origin`: times go from 1 to 0.001 in the block's steps, and a position is revealed when its own time
    is passed.

    Each position has one time, drawn evenly from 0 to 1, so that of those still masked at time t the share 1 - s
    / t is revealed on
    the way to s. Steps that reveal nothing are passed over.
    """
    steps = step.block.steps
    times = [1 + (0.001 - 1) * i / steps for i in range(steps)] + [0.0]
    own = {p: step.uniform(p, 0) for p in step.masked}
    for time in times[1:]:
        revealed = [p for p in step.masked if own[p] > time]
        if revealed:
            return step.unmask(revealed)
    raise AssertionError("the last step reveals all")


def confidence_eos_eot_inf(step: Step) -> list[int]:
    """As `static`; EOS and the end of turn have no confidence, above temperature 0 the end of turn alone."""
    ends = {step.block.end_of_turn} if step.block.temperature else {step.block.eos, step.block.end_of_turn}
    score = {p: softmax(step.logits[p], ends | {step.block.mask})[step.token(p)] for p in step.masked}
    return step.unmask(best(step.masked, score, step.share()))


def eoser(step: Step) -> list[int]:
    """As `static`; the confidence of EOS grows from a part of it to all of it over the steps of the whole
    generation.
    """
    low, high = step.options["eoser_gamma_min"], step.options["eoser_gamma_max"]
    last = step.block.all_steps - 1
    gone = min(step.number, last) / last if last > 0 else 1.0
    return step.unmask(best(step.masked, damped(step, low + (high - low) * gone), step.share()))


def ass(step: Step) -> list[int]:
    """1, 2, 4, ... positions, in the last step the rest; a block has as many steps as twos go into its length."""
    return step.unmask(best(step.masked, {p: step.confidence(p) for p in step.masked}, doubled(step)))


def eoser_ass(step: Step) -> list[int]:
    low, high = step.options["eoser_ass_gamma_min"], step.options["eoser_ass_gamma_max"]
    steps = num_doublings(step)
    gone = (2 ** (step.number + 1) - 1) / 2**steps if steps > 1 else 1.0
    return step.unmask(best(step.masked, damped(step, low + (high - low) * gone), doubled(step)))


def damped(step: Step, factor: float) -> dict[int, float]:
    return {p: step.confidence(p) * (factor if step.token(p) == step.block.eos else 1) for p in step.masked}


def num_doublings(step: Step) -> int:
    return int(math.log2(step.block.length))


def doubled(step: Step) -> int:
    is_last = step.number >= num_doublings(step) - 1
    return len(step.masked) if is_last else 2**step.number
