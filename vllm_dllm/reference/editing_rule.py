"""LLaDA2.1's rule, which replaces written tokens, and its loop over blocks where keys and values never change."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vllm_dllm.reference.block_causal import decoded_region, store
from vllm_dllm.reference.layers import LayerKv
from vllm_dllm.reference.qwen import Qwen
from vllm_dllm.reference.rules import Canvas, Look, Rule, RuleGeneration, best, masked, write


@dataclass(slots=True)
class Editing:
    """LLaDA2.1's `generate` (inclusionAI/LLaDA2.1-mini), in a block.

    A step writes the masked places of a confidence above the threshold, or the best `least`, and at once replaces each
    written token whose place is not the prompt's where another is likeliest, with a confidence above
    `editing_threshold`. A block without masked places goes on until a step replaces nothing, for `post_steps` steps.

    Attributes:
        threshold: of masked places.
        editing_threshold: of written ones.
        post_steps: steps of a block without masked places, at most.
        least: masked places that a step writes at least.
        num_known: places at the block's begin that are the prompt's.
        goes_on: whether there is another step though no place is masked.
    """

    threshold: float = 0.9
    editing_threshold: float = 0.9
    post_steps: int = 16
    least: int = 1
    num_known: int = 0
    goes_on: bool = False
    num_post: int = 0

    def step(self, canvas: Canvas, looks: Sequence[Look]) -> Canvas:
        """Return the next canvas."""
        was_full = None not in canvas
        confidence = [look.confidence for look in looks]
        chosen = [place for place in masked(canvas) if confidence[place] > self.threshold]
        if len(chosen) < self.least:
            chosen = best(masked(canvas), confidence, int(self.least))
        edited = [
            place
            for place, token in enumerate(canvas)
            if place >= self.num_known
            and token not in (None, looks[place].token)
            and confidence[place] > self.editing_threshold
        ]
        after = write(canvas, looks, [*chosen, *edited])
        self.num_post += was_full
        self.goes_on = None not in after and not (was_full and not edited) and self.num_post < self.post_steps
        return after


class EditingRule(Rule, Protocol):
    """A rule that says whether a block without masked places goes on."""

    goes_on: bool


@torch.no_grad()
def generate(
    model: Qwen,
    prompt: Tensor,
    *,
    gen_length: int,
    block_length: int,
    rule: Callable[[int], EditingRule],
    stop_ids: tuple[int, ...] = (),
) -> RuleGeneration:
    """Generate at least `gen_length` tokens after a prompt [prompt_len] int64, up to the end of a block.

    Args:
        model: a block-causal one.
        prompt: [prompt_len] int64.
        gen_length: least number of tokens.
        block_length: positions per block.
        rule: makes a block's, of the number of its places that are the prompt's.
        stop_ids: a block that generated one of these is the last.
    """
    mask, prompt_len = model.config.mask_token_id, len(prompt)
    first, seq_len = decoded_region(prompt_len, gen_length, block_length)
    tokens = prompt
    kv: list[LayerKv] | None = None
    nfe, num_stored = 0, 0
    for begin in range(first, seq_len, block_length):
        if num_stored < begin:
            _, kv = store(model, tokens[:begin], num_stored, kv, block_length)
            num_stored = begin
        known = prompt[begin:].tolist()
        its = rule(len(known))
        canvas: Canvas = [*known, *[None] * (block_length - len(known))]
        while None in canvas or its.goes_on:
            block = torch.tensor([mask if token is None else token for token in canvas])
            logits, _ = model.forward(block, begin, kv)
            canvas = its.step(canvas, [Look.of(row, mask) for row in logits])
            nfe += 1
        tokens = torch.cat((tokens[:begin], torch.tensor(canvas)))
        if set(canvas[len(known) :]) & set(stop_ids):
            break
    return RuleGeneration(tokens[prompt_len:].tolist(), nfe)
