"""Whole decodes of trained models are those of the plain statements, for each policy; drafts change no token.

Of the models in this repository. `STATEMENT_MODELS` in the environment names folders of others, with ":" between them:
checkpoints of LLaDA or SDAR.
"""

import functools
import json
import os
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.draft.test_exact import EOS, MASK
from tests.draft.test_exact_cases import ALTERNATIVES, CHAIN
from tests.e2e.questions import CHECKPOINT, EXAMPLES, questions
from tests.statements.requests import request, stated
from tests.unmask.torch_policies import Own, decode
from vllm_dllm.reference.block_causal import store_prompt
from vllm_dllm.reference.model import LLaDA
from vllm_dllm.reference.qwen import Qwen
from vllm_dllm.unmask.registry import BUILT_IN, NATIVE

MODELS = (
    CHECKPOINT,
    EXAMPLES / "tiny_sdar/checkpoint",
    *filter(None, os.environ.get("STATEMENT_MODELS", "").split(":")),
)
LENGTHS = (8, 8, 4, 8, 5)
SHARPNESS = (1.0, 0.3)
"""What logits are multiplied by: these models are so sure of their answers that many a policy would take one step."""
BATCH, SOME, ALL = 2, 4, 50


class TrainedBlock:
    """A trained model's logits of the block behind a prompt: of a canvas the same bits whenever they are asked."""

    def __init__(self, checkpoint: Path, prompt: tuple[int, ...], block_length: int, sharpness: float) -> None:
        self.model, self.sharpness = load(checkpoint), sharpness
        assert (self.model.config.mask_token_id, self.model.config.eos_token_id) == (MASK, EOS)
        self.config, self.block_length = self.model.config, block_length
        self.prompt = torch.tensor(prompt)
        self.begin = len(prompt) - len(prompt) % block_length if isinstance(self.model, Qwen) else len(prompt)
        self.tail = prompt[self.begin :]
        """Tokens of the prompt in the block."""
        self.found: dict[tuple[int, ...], torch.Tensor] = {}

    @torch.no_grad()
    def _forward(self, canvas: torch.Tensor) -> torch.Tensor:
        if isinstance(self.model, Qwen):
            kv = store_prompt(self.model, self.prompt, self.block_length)
            return self.model.forward(canvas, self.begin, kv)[0]
        behind = torch.full((self.block_length,), MASK)
        logits, _ = self.model.forward(torch.cat((self.prompt, canvas, behind)))
        return logits[self.begin : self.begin + self.block_length]

    def of(self, ids: tuple[int, ...]) -> torch.Tensor:
        if ids not in self.found:
            self.found[ids] = self.sharpness * self._forward(torch.tensor(ids))
        return self.found[ids]

    def block_logits(self, canvas: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.of(tuple(row)) for row in canvas.tolist()])

    def stated(self, own: Own) -> tuple[list[int], int]:
        return stated(own, self.block_length, 1, lambda *_: lambda ids: self.of(tuple(ids)).tolist())


@functools.cache
def load(checkpoint: Path) -> LLaDA | Qwen:
    kind = json.loads((Path(checkpoint) / "config.json").read_text())["model_type"]
    return {"llada": LLaDA, "sdar": Qwen}[kind].from_pretrained(checkpoint, torch.float32)


@functools.cache
def blocks(count: int) -> list[TrainedBlock]:
    """Blocks of all models in turn; they keep what was asked of them for all policies."""
    prompts = {checkpoint: questions(count, Path(checkpoint)) for checkpoint in MODELS}
    made = []
    for i in range(count):
        checkpoint, sharpness = MODELS[i % len(MODELS)], SHARPNESS[i // len(MODELS) % len(SHARPNESS)]
        made.append(TrainedBlock(checkpoint, prompts[checkpoint][i], LENGTHS[i % len(LENGTHS)], sharpness))
    return made


@pytest.mark.parametrize("num_blocks", [SOME, pytest.param(ALL, marks=pytest.mark.slow("cases"))])
@pytest.mark.parametrize("policy", sorted((*NATIVE, *BUILT_IN)))
def test_decodes_of_trained_models_are_the_statements(policy: str, num_blocks: int) -> None:
    """So many blocks, each with requests side by side; of all of them with drafts the same tokens and steps."""
    rng, wrong, accepted = random.Random(policy), [], 0
    for number, block in enumerate(blocks(num_blocks)):
        requests = [replace(request(policy, rng), tail=block.tail) for _ in range(BATCH)]
        found = decode(block, requests, is_native=number % 2 == 0)
        graph, budget = (CHAIN, 7) if block.block_length == 8 else (ALTERNATIVES, 5)
        drafted = decode(block, requests, graph, budget, is_native=number % 2 == 0)
        for own, its, other in zip(requests, found, drafted, strict=True):
            accepted += other.accepted
            assert (other.tokens, other.steps) == (its.tokens, its.steps), own
            if (its.tokens, its.steps) != (expected := block.stated(own)):
                wrong.append((number, own, its.tokens, its.steps, expected))
    assert not wrong, f"{len(wrong)}: {wrong[:2]}"
    assert accepted > 0 or num_blocks < ALL, "no draft came true"
