"""Whole decodes of random models are those of the plain statements, for each policy, alone and beside others.

`STATEMENT_CASES` in the environment says how many requests of each policy; 60 without it. Rows that are nearly equal
differ by a thousandth of a logit: the reduction is exact to a relative 1e-7 (docs/exactness.md), so closer ones tell
nothing.
"""

import os
import random
from dataclasses import replace

import pytest
import torch

from tests.draft.test_exact import EOS, MASK, VOCAB, SyntheticModel
from tests.statements.decode import RULES, decode_block
from tests.statements.step import NEVER, Block
from tests.unmask.torch_policies import EOT, Own, decode, drawn, net, unmasking_net
from vllm_dllm.state.request_params import RequestParams
from vllm_dllm.unmask.registry import BUILT_IN
from vllm_dllm.unmask.schedule import UnmaskRules

BLOCKS = 2
CASES = int(os.environ.get("STATEMENT_CASES", "60"))
BATCH = 6
LENGTHS = (4, 8, 16, 5, 24, 8, 12, 32, 16, 64)
KINDS = ("plain", "equal tokens", "equal rows", "near rows", "impossible tokens")
DEFAULTS = {
    "factor": 1.0, "entropy_bound": 0.35, "credit_alpha": 0.7, "credit_beta": 0.8, "credit_gamma": 0.2,
    "local_leap_relaxed": 0.75, "local_leap_radius": 4, "entropy_threshold_bound": 0.5, "hierarchy_low": 0.4,
    "eoser_gamma_min": 0.4, "eoser_gamma_max": 1.0, "eoser_ass_gamma_min": 0.01, "eoser_ass_gamma_max": 1.0,
    "learn2pd_accept": 0.96, "learn2pd_eotp_accept": 0.96, "dit_confidence_temperature": 1.0, "saber_least": 2,
    "remdm_loops": 4, "remdm_number": 1, "ccd_ratio": 4.0, "prophet_gap_early": 7.5, "prophet_gap_middle": 5.0,
    "prophet_gap_late": 2.5, "prophet_begin": 0, "prophet_length": 0, "adablock_delimiter": 198,
    "adablock_sure": 0.3, "adablock_length": 32, "adablock_ahead": 0.25, "deferred_width": 16, "deferred_most": 128,
    "editing_threshold": 0.9, "editing_post_steps": 16, "editing_least": 1, "indel_edit_threshold": 0.0,
    "indel_post_steps": 16, "indel_delete": 156930, "indel_split": 156931,
}  # fmt: skip
"""Options and defaults as docs/policies.md has them."""


class Native(Own):
    """A request with a native policy, whose `values` are options by their full names."""

    def params(self, rules: UnmaskRules, block_length: int, seq_len: int) -> RequestParams:
        changes: dict = dict(self.values)
        return replace(super().params(rules, block_length, seq_len), **changes)


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


def request(policy: str, rng: random.Random) -> Own:
    if policy not in BUILT_IN:
        values = {
            "factor": {"factor": rng.choice([0.3, 1.0, 2.5])},
            "entropy_bounded": {"entropy_bound": rng.choice([0.05, 0.35, 2.0, 6.0])},
            "credit": {
                "credit_alpha": rng.choice([0.0, 0.7, 3.0]),
                "credit_beta": rng.choice([0.0, 0.8, 1.0]),
                "credit_gamma": rng.choice([0.2, 1.0]),
            },
        }.get(policy, {})
        steps = rng.choice([1, 2, 4]) if policy == "dynamic" else rng.choice([1, 2, 3, 4, 5, 8, 64])
        return Native(policy, tuple(values.items()), rng.choice([0.3, 0.6, 0.9]), steps, rng.randrange(-99, 99))
    own = drawn(policy, rng)
    if policy == "prophet" and rng.random() < 0.5:
        span = (("begin", rng.randrange(12)), ("length", rng.choice([0, 1, 3, 20])))
        own = replace(own, values=own.values + span)
    return own


def with_tail(own: Own, rng: random.Random, length: int) -> Own:
    """Let a request's prompt end in its first block, as every second one does."""
    tokens = [token for token in range(VOCAB) if token != MASK]
    return replace(own, tail=tuple(rng.choices(tokens, k=rng.choice([0, rng.randrange(length)]))))


def stated(model: SyntheticModel, own: Own) -> tuple[list[int], int]:
    """Decode a request by the plain statement; its tokens, and the steps it took."""
    length = model.block_length
    prefix = f"{own.policy}_" if own.policy in BUILT_IN else ""
    options: dict = DEFAULTS | {prefix + name: value for name, value in own.values}
    options["threshold"] = own.threshold
    if own.policy.startswith("learn2pd"):
        options["net"] = {name: its.double() for name, its in net(length).items()}
    if own.policy == "dit_confidence":
        options["net"] = {name.split(".", 1)[1]: its.double() for name, its in unmasking_net().items()}
        options["heads"] = 2
    tokens: list[int] = []
    taken, known, memory = 0, list(own.tail), {}
    for number in range(BLOCKS):
        canvas = known + [MASK] * (length - len(known))
        block = Block(
            mask=MASK, given=[token != MASK for token in canvas], steps=min(own.steps, length),
            all_steps=min(own.steps, length) * BLOCKS, begin=number * length - len(own.tail), start=number * length,
            decided=taken, reply=BLOCKS * length - len(own.tail), seed=own.seed, eos=EOS, end_of_turn=EOT,
        )  # fmt: skip
        done, steps = decode_block(
            own.policy, block, canvas, lambda ids: model.block_logits(torch.tensor([ids]))[0].tolist(), options, memory
        )
        tokens, taken, known = tokens + done, taken + steps, []
    return tokens, taken


def differences(model: EdgeModel, requests: list[Own], *, is_native: bool) -> list:
    """Decode requests side by side; returns those that the statements decode to other tokens, or in other steps."""
    made = decode(model, requests, num_blocks=BLOCKS, is_native=is_native)
    pairs = [(own, (its.tokens, its.steps), stated(model, own)) for own, its in zip(requests, made, strict=True)]
    return [(model.kind, model.block_length, is_native, *pair) for pair in pairs if pair[1] != pair[2]]


def models(number: int, rng: random.Random) -> list[EdgeModel]:
    return [
        EdgeModel(LENGTHS[i % len(LENGTHS)], i, rng.choice([0.5, 3.0, 8.0]), KINDS[(i + i // len(KINDS)) % len(KINDS)])
        for i in range(number)
    ]


@pytest.mark.parametrize("policy", sorted(RULES))
def test_decodes_are_the_statements(policy: str) -> None:
    rng, wrong = random.Random(policy), []
    for number, model in enumerate(models(-(-CASES // BATCH), rng)):
        requests = [with_tail(request(policy, rng), rng, model.block_length) for _ in range(BATCH)]
        wrong += differences(model, requests, is_native=number % 2 == 0)
    assert not wrong, f"{len(wrong)} of {CASES}: {wrong[:2]}"


def test_sixteen_policies_in_one_batch_decode_as_their_statements() -> None:
    rng, wrong = random.Random(16), []
    for number, model in enumerate(models(-(-CASES // 12), rng)):
        requests = [
            with_tail(request(policy, rng), rng, model.block_length) for policy in rng.sample(sorted(RULES), 16)
        ]
        wrong += differences(model, requests, is_native=number % 2 == 0)
    assert not wrong, f"{len(wrong)}: {wrong[:2]}"
