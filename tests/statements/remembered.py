"""Rules that go by what earlier steps of the block said, and write each position once: CCD, Prophet, AdaBlock, DCD."""

from tests.statements.bounded import at_least
from tests.statements.counted import static
from tests.statements.step import Step, best

WARM_UP = 5


def ccd(step: Step) -> list[int]:
    """CCD with `seek_mode`: positions of the buffer of the step before whose likeliest token has stayed, or the
    share of a step, one at least.
    """
    share = max(step.block.own // step.block.steps, 1)
    order = best(step.masked, {p: -step.entropy(p) for p in step.masked}, len(step.masked))
    likeliest = {p: step.likeliest(p) for p in step.masked}
    size = ccd_size(step, share)
    buffer, before = step.memory.get("buffer", []), step.memory.get("likeliest", {})
    chosen = order[:share]
    if WARM_UP <= step.number < step.block.steps - 1 and set(chosen) & set(buffer):
        stayed = [p for p in order[:size] if p in buffer and likeliest[p] == before[p]]
        if len(stayed) >= share:
            chosen = stayed
    step.memory["likeliest"] = likeliest
    step.memory["buffer"] = [p for p in order if p not in chosen][:size]
    return step.unmask(chosen)


def ccd_size(step: Step, share: int) -> int:
    """The buffer's size: 1 in the first steps, then one more each step up to the largest; begun anew near the
    block's end.
    """
    size = step.memory.get("size", 1)
    if len(step.masked) <= 0.1 * step.block.own:
        size = 1
    size = 1 if step.number < WARM_UP - 1 else min(size + 1, share + int(share * step.options["ccd_ratio"]))
    step.memory["size"] = size
    return size


def prophet(step: Step) -> list[int]:
    """As `static`; all, once the two likeliest tokens' logits are far enough apart on the average of the answer."""
    begin = int(step.options["prophet_begin"]) - step.block.begin
    end = begin + int(step.options["prophet_length"]) if step.options["prophet_length"] else step.block.length
    span = range(max(begin, 0), min(end, step.block.length))
    gone = step.number / step.block.steps
    name = "early" if gone < 0.33 else "middle" if gone < 0.67 else "late"
    if span and sum(gap(step, p) for p in span) / len(span) >= step.options[f"prophet_gap_{name}"]:
        return step.unmask(step.masked)
    return static(step)


def gap(step: Step, position: int) -> float:
    others = [logit for token, logit in enumerate(step.logits[position]) if token != step.block.mask]
    first, second = sorted(others, reverse=True)[:2]
    return first - second


def adablock(step: Step) -> list[int]:
    """As `threshold`, in one part of the block after another; a part ends at the surest delimiter ahead, if that
    is sure enough.
    """
    end = step.memory.get("end", 0)
    if not any(step.is_masked(p) for p in range(end)):
        start = min(step.masked)
        step.memory["end"] = end = start + part_length(step, start)
    part = [p for p in step.masked if p < end]
    return step.unmask(at_least(step, part, {p: step.confidence(p) for p in part}, step.options["threshold"]))


def part_length(step: Step, start: int) -> int:
    remaining = step.block.length - start
    ahead = min(int(step.options["adablock_ahead"] * step.block.reply), remaining)
    delimiters = [p for p in range(start, start + ahead) if step.token(p) == step.options["adablock_delimiter"]]
    for surest in best(delimiters, {p: step.confidence(p) for p in delimiters}, 1):
        if step.confidence(surest) >= step.options["adablock_sure"]:
            return surest - start + 1
    return min(int(step.options["adablock_length"]), remaining)


def deferred(step: Step) -> list[int]:
    """As `threshold`, in a window, at first so wide from the first masked position: its left end passes what is known,
    its right end moves on by as much as is filled.
    """
    width, most = int(step.options["deferred_width"]), int(step.options["deferred_most"])
    right = step.memory.get("right", min(step.masked[0] + width, step.block.length))
    window = [p for p in step.masked if p < right]
    if not window:
        raise AssertionError("a window holds a masked position")
    chosen = at_least(step, window, {p: step.confidence(p) for p in window}, step.options["threshold"])
    left = [p for p in step.masked if p not in chosen]
    if left:
        inside = [p for p in left if p < right]
        step.memory["right"] = min(right + width - len(inside), min(left) + most, step.block.length)
    return step.unmask(chosen)
