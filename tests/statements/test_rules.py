"""Whole decodes of random models are those of the plain statements, for each policy, alone and beside others.

Every run has 18 requests of each policy; the slow test has 60, or more by `STATEMENT_CASES` in the environment.
Rows that are nearly equal differ by a thousandth of a logit: the reduction is exact to a relative 1e-7
(docs/exactness.md), so closer ones tell nothing.
"""

import os
import random
from dataclasses import replace

import pytest
import torch

from tests.draft.test_exact import MASK, VOCAB, SyntheticModel
from tests.statements.decode import RULES
from tests.statements.requests import request, stated, with_tail
from tests.statements.step import NEVER
from tests.unmask.torch_policies import Own, decode
from vllm_dllm.unmask.registry import BUILT_IN, NATIVE

BLOCKS = 2
CASES = max(60, int(os.environ.get("STATEMENT_CASES", "60")))
BATCH = 6
LENGTHS = (4, 8, 16, 5, 24, 8, 12, 32, 16, 64)
KINDS = ("plain", "equal tokens", "equal rows", "near rows", "impossible tokens")


class EdgeModel(SyntheticModel):
    """A model whose tokens or positions are equally likely, or nearly so, or which has only six possible tokens."""

    def __init__(self, block_length: int, seed: int, sharpness: float, kind: str) -> None:
        super().__init__(block_length, seed, sharpness)
        generator = torch.Generator().manual_seed(seed)
        self.kind = kind
        # What a batch's float32 sums differ by from one canvas's would change what is rounded.
        self.own, self.context = self.own.double(), self.context.double()
        self.noise = torch.randn(block_length, VOCAB, generator=generator)
        self.never = self.noise > self.noise.topk(6, dim=-1, largest=False).values[:, -1:]
        self.never[:, MASK] = False

    def block_logits(self, canvas: torch.Tensor) -> torch.Tensor:
        return self._edged(super().block_logits(canvas)).float()

    def _edged(self, logits: torch.Tensor) -> torch.Tensor:
        if self.kind == "equal tokens":
            return (logits * 2).round() * (0.5 + 0.01 * torch.arange(self.block_length)[:, None])
        if self.kind == "impossible tokens":
            return logits.masked_fill(self.never, NEVER)
        if self.kind in {"equal rows", "near rows"}:
            place = torch.arange(self.block_length)
            logits = logits[:, place - place % 3]
        return logits + 1e-3 * self.noise if self.kind == "near rows" else logits


def by_statement(model: EdgeModel, own: Own) -> tuple[list[int], int]:
    def forward(ids: list[int]) -> list[list[float]]:
        return model.block_logits(torch.tensor([ids]))[0].tolist()

    return stated(own, model.block_length, BLOCKS, lambda *_: forward)


def differences(model: EdgeModel, requests: list[Own], *, is_native: bool) -> list:
    """Decode requests side by side; returns those that the statements decode to other tokens, or in other steps."""
    made = decode(model, requests, num_blocks=BLOCKS, is_native=is_native)
    pairs = [(own, (its.tokens, its.steps), by_statement(model, own)) for own, its in zip(requests, made, strict=True)]
    return [(model.kind, model.block_length, is_native, *pair) for pair in pairs if pair[1] != pair[2]]


def models(number: int, rng: random.Random) -> list[EdgeModel]:
    return [
        EdgeModel(LENGTHS[i % len(LENGTHS)], i, rng.choice([0.5, 3.0, 8.0]), KINDS[(i + i // len(KINDS)) % len(KINDS)])
        for i in range(number)
    ]


def test_each_policy_of_the_registry_has_a_statement() -> None:
    assert sorted(RULES) == sorted((*NATIVE, *BUILT_IN))


ALL = range(-(-CASES // BATCH))
USUAL = range(1, 4)  # blocks of 8, 16 and 5; equal tokens, equal rows and near rows


@pytest.mark.parametrize("numbers", [USUAL, pytest.param(ALL, marks=pytest.mark.slow("cases"))], ids=["some", "all"])
@pytest.mark.parametrize("policy", sorted(RULES))
def test_decodes_are_the_statements(policy: str, numbers: range) -> None:
    rng, wrong = random.Random(policy), []
    made = models(max(*ALL, *USUAL) + 1, rng)
    for number in numbers:
        requests = [with_tail(request(policy, rng), rng, made[number].block_length) for _ in range(BATCH)]
        wrong += differences(made[number], requests, is_native=number % 2 == 0)
    assert not wrong, f"{len(wrong)} of {len(numbers) * BATCH}: {wrong[:2]}"


def test_sixteen_policies_in_one_batch_decode_as_their_statements() -> None:
    rng, wrong = random.Random(16), []
    for number, model in enumerate(models(-(-CASES // 12), rng)):
        requests = [
            with_tail(request(policy, rng), rng, model.block_length) for policy in rng.sample(sorted(RULES), 16)
        ]
        wrong += differences(model, requests, is_native=number % 2 == 0)
    assert not wrong, f"{len(wrong)}: {wrong[:2]}"


class TurningModel(EdgeModel):
    """One that is sure of another token wherever one is written, and so never content with what it wrote."""

    def block_logits(self, canvas: torch.Tensor) -> torch.Tensor:
        logits = super().block_logits(canvas)
        next_one = torch.where(canvas + 1 == MASK, canvas + 2, canvas + 1) % VOCAB
        return logits + 30.0 * torch.nn.functional.one_hot(next_one, VOCAB) * (canvas != MASK)[..., None]


@pytest.mark.parametrize(
    ("policy", "values"),
    [
        ("editing", (("threshold", 0.0), ("post_steps", 128), ("least", 1))),
        ("remdm", (("loops", 16), ("number", 1))),
        ("indel", (("edit_threshold", 0.0), ("post_steps", 32), ("delete", 8), ("split", 9))),
    ],
)
def test_a_block_that_goes_round_in_circles_ends_as_stated(policy: str, values: tuple) -> None:
    """Behind 8 steps per position what is written stands; LLaDA2.2's rule ends by itself."""
    rng, wrong, longest = random.Random(0), [], 0.0
    for number, length in enumerate((1, 2, 4, 5, 8, 2)):
        model = TurningModel(length, number, 1.0, "plain")
        requests = [with_tail(Own(policy, values, threshold, 64), rng, length) for threshold in (0.3, 0.97)]
        wrong += differences(model, [replace(requests[0], tail=()), *requests], is_native=number % 2 == 0)
        longest = max(longest, by_statement(model, replace(requests[0], tail=()))[1] / (BLOCKS * length))
    assert not wrong, f"{len(wrong)}: {wrong[:2]}"
    assert longest > 8, "no block came so far"


class WaveModel(EdgeModel):
    """One that knows nothing of a block, and all of its first positions, as many as `wave`, once one is written."""

    wave = 8

    def block_logits(self, canvas: torch.Tensor) -> torch.Tensor:
        knows = (canvas != MASK).any(1)[:, None, None] & (torch.arange(self.block_length) < self.wave)[:, None]
        return super().block_logits(canvas) * knows


@pytest.mark.parametrize("wave", [7, 8, 9, 16, 17, 24, 25])
def test_an_eighth_of_what_a_step_of_saber_writes_is_masked_again(wave: int) -> None:
    """Rounded up, which few drawn steps show: they write fewer."""
    model = WaveModel(32, wave, 2.0, "plain")
    model.wave = wave
    requests = [Own("saber", (("least", least),), 0.9, 64) for least in (1, 2)]
    assert not differences(model, requests, is_native=False)
