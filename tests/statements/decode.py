"""The loop over a block and over a reply, for any rule: until done, logits = forward(canvas), canvas = rule(...)."""

from collections.abc import Callable

from tests.statements import bounded, counted, ends, indel, nets, remembered, rewriting
from tests.statements.step import Block, Step, best

Forward = Callable[[list[int]], list[list[float]]]

RULES: dict[str, Callable] = {
    rule.__name__: rule
    for rule in (
        counted.static, counted.random, counted.margin, counted.entropy, counted.origin, counted.sequential,
        bounded.threshold, bounded.factor, bounded.dynamic, bounded.entropy_bounded, bounded.credit,
        bounded.local_leap, bounded.entropy_threshold, bounded.hierarchy, counted.eoser, counted.ass, counted.eoser_ass,
        counted.confidence_eos_eot_inf, nets.learn2pd, ends.eotp, ends.learn2pd_eotp, nets.dit_confidence,
        rewriting.saber, rewriting.rcr, rewriting.remdm, remembered.ccd, remembered.prophet, remembered.adablock,
        remembered.deferred, rewriting.editing, indel.indel,
    )
}  # fmt: skip
"""Each policy of docs/policies.md, by name."""

CHANGES_TOKENS = {"saber", "rcr", "remdm", "editing", "indel"}
"""Rules that say themselves when a block is done; others are done when nothing is masked."""


def decide(policy: str, step: Step) -> tuple[list[int], bool]:
    """The next canvas, and whether the block is done."""
    step.memory.setdefault("request", {})
    result = RULES[policy](step)
    canvas, is_done = result if policy in CHANGES_TOKENS else (result, step.block.mask not in result)
    if policy in CHANGES_TOKENS - {"indel"} and step.number >= 8 * step.block.length:
        return stands(step, canvas)
    if policy == "indel":
        most = step.block.length + step.options["indel_post_steps"] + 1
        assert is_done or step.number + 1 < most, f"the rule ends a block in {most} steps by itself"
    return canvas, is_done


def stands(step: Step, canvas: list[int]) -> tuple[list[int], bool]:
    """Behind 8 steps per position what is written stands, whatever the rule says; a step writes the surest at least."""
    kept = [canvas[p] if step.is_masked(p) else token for p, token in enumerate(step.canvas)]
    if kept == step.canvas:
        kept = step.unmask(best(step.masked, {p: step.confidence(p) for p in step.masked}, 1))
    return kept, step.block.mask not in kept


def decode_block(
    policy: str, block: Block, canvas: list[int], forward: Forward, options: dict, request: dict
) -> tuple[list[int], int]:
    """Decode one block; the finished canvas and the forwards that it took."""
    memory: dict = {"request": request}
    number = 0
    is_done = block.mask not in canvas
    while not is_done:
        canvas, is_done = decide(policy, Step(block, canvas, forward(canvas), number, options, memory))
        number += 1
    return canvas, number
