"""The learned unmasking policy (arXiv:2512.09106), apple/ml-rl-dllm `DiTConfidencePolicy` and "bernoulli-argmax".

A transformer of one block sees each place's probability of the likeliest token, whether it is masked, and which share
of the generation's steps is taken. It says for each place how likely it is to be unmasked; what is drawn is unmasked,
or the likeliest masked place where nothing is. The published policy sees the whole generation ("full context") or the
block; ours the block, in float64 but for the embedding of time, which is bfloat16 as published, and draws from noise
that is a function of seed, position and step.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from vllm_dllm.noise import STREAM, stream_keys, uniform
from vllm_dllm.reference.rules import Canvas, Look, best, masked, write


@dataclass(slots=True)
class Taken:
    """What the blocks of a reply share."""

    begin: int  # of the next block, absolute
    steps: int = 0


@dataclass(slots=True)
class DitConfidence:
    """The rule in a block; `net` has a checkpoint's tensors, `gen_length` the places of the generation."""

    net: Mapping[str, Tensor]
    gen_length: int
    taken: Taken
    seed: int
    temperature: float = 1.0
    begin: int = -1
    number: int = 0

    def step(self, canvas: Canvas, looks: Sequence[Look]) -> Canvas:
        """Return the next canvas."""
        if self.number == 0:
            self.begin = self.taken.begin
            self.taken.begin += len(canvas)
        is_masked = torch.tensor([token is None for token in canvas])
        probability = torch.tensor([look.confidence for look in looks], dtype=torch.float64)
        scores = (self._logits(is_masked, probability) / self.temperature).tolist()
        place = torch.arange(self.begin, self.begin + len(canvas))
        keys = stream_keys(torch.full_like(place, self.seed), place, torch.full_like(place, self.number))
        noise = uniform(keys, STREAM).tolist()
        drawn = [at for at in masked(canvas) if noise[at] < 1 / (1 + math.exp(-scores[at]))]
        self.number, self.taken.steps = self.number + 1, self.taken.steps + 1
        return write(canvas, looks, drawn or best(masked(canvas), scores, 1))

    def _logits(self, is_masked: Tensor, probability: Tensor) -> Tensor:
        """Return a number of each place, of whether it is masked and its probability; all [length]."""
        time = self.taken.steps / self.gen_length
        waves = torch.tensor([math.cos(time)] * 64 + [math.sin(time)] * 64).bfloat16().double()
        about_time = self._linear("time_mlp.2", functional.silu(self._linear("time_mlp.0", waves)))
        about = functional.embedding(is_masked.long(), self._of("mask_embedding.weight")) + about_time
        modulation = self._linear("transformer_blocks.0.ada_conditioning", about).view(len(is_masked), 6, 128)
        gamma1, beta1, alpha1, gamma2, beta2, alpha2 = modulation.unbind(1)
        x = self._linear("confidence_proj", probability[:, None])
        x = x + (1 + alpha1) * self._attend((1 + gamma1) * self._norm("transformer_blocks.0.norm1", x) + beta1)
        inner = (1 + gamma2) * self._norm("transformer_blocks.0.norm2", x) + beta2
        inner = functional.gelu(self._linear("transformer_blocks.0.linear1", inner))
        x = x + (1 + alpha2) * self._linear("transformer_blocks.0.linear2", inner)
        return self._linear("output_proj", self._norm("final_norm", x)).squeeze(1)

    def _attend(self, x: Tensor) -> Tensor:
        """Attend in two heads; [length, 128]. Pairs of neighbours are turned as complex numbers."""
        frequency = self._of("transformer_blocks.0.inv_freq")
        turn = torch.polar(torch.ones_like(frequency), torch.arange(len(x), dtype=torch.float64)[:, None] * frequency)

        def heads(name: str) -> Tensor:
            return self._linear(f"transformer_blocks.0.{name}_proj", x).view(len(x), 2, 64).transpose(0, 1)

        q, k = (torch.view_as_complex(heads(name).reshape(2, len(x), 32, 2)) * turn for name in "qk")
        q, k = (torch.cat([each.real, each.imag], -1) for each in (q, k))
        seen = functional.scaled_dot_product_attention(q, k, heads("v"))
        return self._linear("transformer_blocks.0.out_proj", seen.transpose(0, 1).reshape(len(x), 128))

    def _of(self, name: str) -> Tensor:
        return self.net[f"base_policy.{name}"].double()

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return functional.linear(x, self._of(f"{name}.weight"), self._of(f"{name}.bias"))

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return functional.layer_norm(x, (128,), self._of(f"{name}.weight"), self._of(f"{name}.bias"))
