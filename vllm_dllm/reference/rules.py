"""Policies of the literature without a native twin, as published: what a step makes of a block, one by one.

`generate` is the loop, the same for all: LLaDA's blocks under the dual cache or none (`reference.decode`), greedy. A
*rule* gets what the model says of each position and returns the next canvas; it is an object of the block, so that it
may remember. Confidence is of float64 softmax over all tokens but the mask. Batch of one; where scores are equal, the
lowest position comes first.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vllm_dllm.reference.decode import KvPolicy, Model, Predictor

Canvas = list[int | None]
"""Tokens of a block; None: masked."""


@dataclass(frozen=True, slots=True)
class Look:
    """What the model says of a position; of all tokens but the mask, except for `logits`."""

    token: int  # the likeliest
    confidence: float  # its probability
    margin: float  # by how much that is above the second
    entropy: float  # in nats
    probs: Tensor  # [vocab] float64
    logits: Tensor  # [vocab] float64, with the mask token's
    mask_token_id: int

    @classmethod
    def of(cls, logits: Tensor, mask_token_id: int) -> "Look":
        """Look at a row of logits [vocab]."""
        of_all = logits.double()
        logits = of_all.index_fill(0, torch.tensor([mask_token_id]), -torch.inf)
        probs = logits.softmax(0)
        first, second = probs.topk(2).values.tolist()
        entropy = float(torch.special.entr(probs).sum())
        return cls(int(logits.argmax()), first, first - second, entropy, probs, of_all, mask_token_id)


class Rule(Protocol):
    """A policy in a block. One with `goes_on` says by it whether a block without masks goes on."""

    def step(self, canvas: Canvas, looks: Sequence[Look]) -> Canvas:
        """Return the next canvas."""


@dataclass(frozen=True, slots=True)
class RuleGeneration:
    """What a call of `generate` did."""

    tokens: list[int]
    nfe: int


@torch.no_grad()
def generate(
    model: Model, prompt: Tensor, *, gen_length: int, block_length: int, rule: Callable[[], Rule], kv: KvPolicy
) -> RuleGeneration:
    """Generate `gen_length` tokens, a multiple of `block_length`, after a prompt [prompt_len] int64.

    Args:
        model: the model.
        prompt: [prompt_len] int64.
        gen_length: tokens.
        block_length: positions per block.
        rule: makes a block's.
        kv: which keys and values a step computes anew.
    """
    mask = model.config.mask_token_id
    tokens = torch.cat([prompt, prompt.new_full((gen_length,), mask)])
    predictor = Predictor(model, torch.arange(len(tokens)) < len(prompt), cfg_scale=0.0, logit_shift=False)
    for number, begin in enumerate(range(len(prompt), len(tokens), block_length)):
        its, step = rule(), 0
        canvas: Canvas = [None] * block_length
        while None in canvas or getattr(its, "goes_on", False):
            first, last, keeps = kv.span(number, step, (begin, begin + block_length), len(tokens), 0)
            logits = predictor.logits(tokens, first, last, keeps=keeps)
            rows = logits[begin - first : begin - first + block_length]
            canvas = its.step(canvas, [Look.of(row, mask) for row in rows])
            tokens[begin : begin + block_length] = torch.tensor([mask if t is None else t for t in canvas])
            step += 1
    return RuleGeneration(tokens[len(prompt) :].tolist(), predictor.nfe)


def masked(canvas: Canvas) -> list[int]:
    """Return the masked places, ascending."""
    return [place for place, token in enumerate(canvas) if token is None]


def best(places: Sequence[int], scores: Sequence[float], count: int) -> list[int]:
    """Return `count` of some places, those of the highest scores [block_length], lowest place first among equals."""
    return sorted(places, key=lambda place: (-scores[place], place))[:count]


def write(canvas: Canvas, looks: Sequence[Look], places: Sequence[int]) -> Canvas:
    """Return a canvas where some places have their likeliest tokens."""
    return [looks[place].token if place in places else token for place, token in enumerate(canvas)]
