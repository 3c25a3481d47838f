"""LLaDA2.2: masked positions are written, written ones replaced, positions deleted and put in (SGLang's
`JointThresholdInDel`).
"""

from dataclasses import dataclass

from tests.statements.step import Step, argmax, best, softmax, without


@dataclass
class Place:
    """A position of the block, and what travels with its token."""

    token: int
    is_given: bool
    is_original: bool
    """Masked from the block's beginning, or written where such a mask was."""


def indel(step: Step) -> tuple[list[int], bool]:
    mask = step.block.mask
    delete, split = int(step.options["indel_delete"]), int(step.options["indel_split"])
    memory = step.memory
    original = memory.setdefault("original", [step.is_masked(p) for p in range(step.block.length)])
    masked = step.masked
    old = [p for p in masked if original[p]]
    memory["updates"] = memory.get("updates", 0) + 1
    memory["post"] = memory.get("post", 0) + (not old)
    posts = step.options["indel_post_steps"]
    tokens = {p: argmax(without(step.logits[p], {mask} if p in old else set())) for p in range(step.block.length)}
    confidence = {p: softmax(step.logits[p], set())[tokens[p]] for p in tokens}
    written = masks_to_write(step, old, confidence) if old else masked
    is_cleanup = memory["updates"] > step.block.length + posts or (
        set(old) <= set(written) if not posts else not old and memory["post"] >= posts
    )
    if is_cleanup:
        written = masked
        tokens = {p: argmax(without(step.logits[p], {mask, delete, split})) for p in tokens}
    edits = [
        p
        for p in range(step.block.length)
        if not step.block.given[p]
        and p not in masked
        and tokens[p] != step.canvas[p]
        and confidence[p] > step.options["indel_edit_threshold"]
    ]
    changed = sorted(written + edits)
    if not changed:
        return list(step.canvas), True
    if not is_cleanup:
        turn_away(step, tokens, confidence, [p for p in changed if tokens[p] != step.canvas[p]], old)
    memory.setdefault("seen", set()).add(tuple(step.canvas))
    for p in changed:
        memory.setdefault("taken", {}).setdefault(p, set()).add(tokens[p])
    places = moved(step, {p: tokens[p] for p in changed}, original, delete, split)
    memory["original"] = [place.is_original for place in places]
    return [place.token for place in places], is_cleanup


def masks_to_write(step: Step, old: list[int], confidence: dict[int, float]) -> list[int]:
    """All above the threshold, if these are more than the masks that were put in; else so many and one more of
    the surest.
    """
    above = [p for p in step.masked if confidence[p] > step.options["threshold"]]
    need = len(step.masked) - len(old) + 1
    return above if len(above) >= need else best(step.masked, confidence, need)


def turn_away(
    step: Step, tokens: dict[int, int], confidence: dict[int, float], changing: list[int], old: list[int]
) -> None:
    """A canvas that was written in before: the least sure change takes the likeliest token that its position
    never took, and no old mask stays one.
    """
    if changing and tuple(step.canvas) in step.memory.get("seen", set()):
        least = best(changing, {p: -confidence[p] for p in changing}, 1)[0]
        barred = step.memory["taken"].get(least, set()) | ({step.block.mask} if least in old else set())
        tokens[least] = argmax(without(step.logits[least], barred))


def moved(step: Step, writes: dict[int, int], original: list[bool], delete: int, split: int) -> list[Place]:
    """Take deleted positions away, put a mask before split ones; the block keeps its length, and the prompt's
    part its place.
    """
    places: list[Place] = []
    for p in range(step.block.length):
        token = writes.get(p, step.canvas[p])
        if step.block.given[p]:
            places.append(Place(step.canvas[p], True, False))
        elif token == split:
            places += [Place(step.block.mask, False, False), Place(step.canvas[p], False, original[p])]
        elif token != delete:
            places.append(Place(token, False, original[p]))
    places += [Place(step.block.mask, False, False)] * step.block.length
    return places[: step.block.length]
