"""What a rule sees of one step of one block, and what is worked out of it: probabilities, tokens, confidences,
orders.
"""

import math
from dataclasses import dataclass, field

import torch

from vllm_dllm.noise import STREAM, gumbel, stream_keys, uniform

NEVER = -math.inf


@dataclass
class Block:
    """What stays the same for all steps of a block."""

    mask: int
    """The mask token; never chosen, and of probability 0."""
    given: list[bool]
    """Positions known before the block's first step: a prompt's end, or given tokens of the answer."""
    steps: int
    """Denoising steps of the block."""
    all_steps: int = 0
    """Denoising steps of the whole generation."""
    begin: int = 0
    """The block's first position behind the reply's begin."""
    start: int = 0
    """The block's first position in the sequence."""
    decided: int = 0
    """Canvases of the reply's earlier blocks that were decided."""
    reply: int = 0
    """Positions of the whole reply."""
    seed: int = 0
    temperature: float = 0.0
    eos: int = -1
    end_of_turn: int = -1

    @property
    def length(self) -> int:
        return len(self.given)

    @property
    def own(self) -> int:
        """How many positions are to be decided: all but those given."""
        return self.length - sum(self.given)


@dataclass
class Step:
    """One step: a canvas, and the logits that the model has for each of its positions."""

    block: Block
    canvas: list[int]
    logits: list[list[float]]
    number: int
    """Canvases of the block that were decided before."""
    options: dict[str, float]
    memory: dict = field(default_factory=dict)
    """What the rule keeps of the block; empty when it begins. Of the request: `memory["request"]`."""
    found: dict[int, list[float]] = field(default_factory=dict)
    """Probabilities that were asked for."""
    tokens: dict[tuple[str, int], int] = field(default_factory=dict)
    """Tokens that were asked for."""

    def is_masked(self, position: int) -> bool:
        return self.canvas[position] == self.block.mask

    @property
    def masked(self) -> list[int]:
        return [position for position in range(self.block.length) if self.is_masked(position)]

    def probabilities(self, position: int) -> list[float]:
        if position not in self.found:
            self.found[position] = softmax(self.logits[position], {self.block.mask})
        return self.found[position]

    def likeliest(self, position: int) -> int:
        key = ("likeliest", position)
        if key not in self.tokens:
            self.tokens[key] = argmax(without(self.logits[position], {self.block.mask}))
        return self.tokens[key]

    def sureness(self, position: int) -> float:
        """The probability of the likeliest token, whichever the position would take."""
        return self.probabilities(position)[self.likeliest(position)]

    def token(self, position: int) -> int:
        """The token that the position would take: the likeliest, or at a temperature a drawn one."""
        if not self.block.temperature:
            return self.likeliest(position)
        key = ("drawn", position)
        if key not in self.tokens:
            self.tokens[key] = self.drawn(position, self.logits[position])
        return self.tokens[key]

    def drawn(self, position: int, logits: list[float]) -> int:
        """The token with the largest noisy logit."""
        key = self.key(position, len(self.masked))
        noise = gumbel(key, torch.arange(len(logits))).tolist()
        kept = without(logits, {self.block.mask})
        return argmax([its + self.block.temperature * noisy for its, noisy in zip(kept, noise, strict=True)])

    def confidence(self, position: int) -> float:
        """The probability of the token that the position would take, neither tempered nor filtered."""
        return self.probabilities(position)[self.token(position)]

    def entropy(self, position: int) -> float:
        return -sum(p * math.log(p) for p in self.probabilities(position) if p > 0)

    def margin(self, position: int) -> float:
        first, second = sorted(self.probabilities(position), reverse=True)[:2]
        return first - second

    def key(self, position: int, progress: int) -> torch.Tensor:
        return stream_keys(*(torch.tensor(value) for value in (self.block.seed, self.block.start + position, progress)))

    def uniform(self, position: int, progress: int) -> float:
        """The position's own random number, a function of the seed, where it is and how far the block is."""
        return float(uniform(self.key(position, progress), STREAM))

    def unmask(self, positions: list[int]) -> list[int]:
        """The canvas with these positions written."""
        canvas = list(self.canvas)
        for position in positions:
            canvas[position] = self.token(position)
        return canvas

    def share(self) -> int:
        """How many positions the schedule gives this step, by what was unmasked since the block began."""
        unmasked = self.block.own - len(self.masked)
        counts = even(self.block.length, self.block.steps)
        reached = 0
        for count in counts:
            reached += count
            if reached > unmasked:
                return count
        return 0


def even(positions: int, steps: int) -> list[int]:
    """LLaDA's schedule: equal shares, what is left over one each to the first steps."""
    return [positions // steps + (step < positions % steps) for step in range(steps)]


def without(logits: list[float], tokens: set[int]) -> list[float]:
    return [NEVER if token in tokens else logit for token, logit in enumerate(logits)]


def softmax(logits: list[float], left_out: set[int]) -> list[float]:
    kept = without(logits, left_out)
    top = max(kept)
    weights = [math.exp(logit - top) if logit > NEVER else 0.0 for logit in kept]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def argmax(values: list[float]) -> int:
    """The first of the largest."""
    return max(range(len(values)), key=lambda index: (values[index], -index))


def best(positions: list[int], score: dict[int, float], count: int) -> list[int]:
    """The `count` positions of the highest score; of equal ones the lowest position first."""
    return sorted(positions, key=lambda position: (-score[position], position))[:count]
