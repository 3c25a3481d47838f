"""Rules that change what they wrote: Saber, RCR, ReMDM, and LLaDA2.1's edits. Each returns the canvas and whether the
block is done.
"""

import math

from tests.statements.bounded import above_or_some
from tests.statements.step import Step, best


def own(step: Step) -> list[int]:
    """Positions that are the rule's: all but those given before."""
    return [p for p in range(step.block.length) if not step.block.given[p]]


def saber(step: Step) -> tuple[list[int], bool]:
    """Writes what is surer than the mean of what was written, and masks again those whose likeliest token gained
    least.
    """
    least = int(step.options["saber_least"])
    now = {p: step.confidence(p) for p in own(step)}
    before, written = step.memory.get("now", dict.fromkeys(now, 0.0)), step.memory.setdefault("written", {})
    gained = {p: now[p] - before[p] for p in now}
    step.memory["now"] = now
    threshold = sum(written.values()) / len(written) if written else 1.0
    chosen = [p for p in step.masked if now[p] > threshold]
    if len(chosen) < least:
        chosen = best(step.masked, now, least)
    written.update({p: now[p] for p in chosen})
    canvas = step.unmask(chosen)
    if step.block.mask not in canvas:
        return canvas, True
    count = max(least, len(chosen))
    again = min(max(least // 2, (count + 7) // 8), count - 1)
    known = [p for p in now if canvas[p] != step.block.mask]
    for position in best(known, {p: -gained[p] for p in known}, again):
        canvas[position] = step.block.mask
    return canvas, False


def rcr(step: Step) -> tuple[list[int], bool]:
    """Writes all, and masks again what a line from the block's own positions to none leaves, rounded down: those that
    were written with the least confidence.
    """
    written = step.memory.setdefault("written", {})
    written.update({p: step.confidence(p) for p in step.masked})
    canvas = step.unmask(step.masked)
    left = math.floor(step.block.own * max(1 - (step.number + 1) / step.block.steps, 1e-6))
    for position in best(list(written), {p: -written[p] for p in written}, left):
        canvas[position] = step.block.mask
    return canvas, step.block.mask not in canvas


def remdm(step: Step) -> tuple[list[int], bool]:
    """As `static`, with steps that mask the least sure tokens, and write as many, behind as many steps as seven
    eighths of a block. A block that is full before them, since it began partly known, has none.
    """
    number, loops = int(step.options["remdm_number"]), int(step.options["remdm_loops"])
    behind = min(step.block.steps, max(min(int(step.block.length * 7 / 8), step.block.length - 1), 1))
    rewriting = range(behind, behind + loops)
    written = step.memory.setdefault("written", {})
    count = number if step.number in rewriting else step.share()
    chosen = best(step.masked, {p: step.confidence(p) for p in step.masked}, count)
    written.update({p: step.confidence(p) for p in chosen})
    canvas = step.unmask(chosen)
    if step.number + 1 in rewriting:
        for position in best(list(written), {p: -written[p] for p in written}, number):
            canvas[position] = step.block.mask
            del written[position]
    return canvas, step.block.mask not in canvas


def editing(step: Step) -> tuple[list[int], bool]:
    """LLaDA2.1: as `dynamic` with a fixed number, and written tokens are replaced where another is sure enough."""
    had_masks = bool(step.masked)
    if not had_masks:
        step.memory["post"] = step.memory.get("post", 0) + 1
    chosen = above_or_some(step, step.options["threshold"], int(step.options["editing_least"])) if had_masks else []
    edits = [
        p
        for p in own(step)
        if not step.is_masked(p)
        and step.token(p) != step.canvas[p]
        and step.confidence(p) > step.options["editing_threshold"]
    ]
    canvas = step.unmask(chosen + edits)
    is_full = step.block.mask not in canvas
    is_spent = step.memory.get("post", 0) >= step.options["editing_post_steps"]
    return canvas, is_full and (is_spent or not (had_masks or edits))
