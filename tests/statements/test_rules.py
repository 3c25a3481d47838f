"""Whole decodes of random models are those of the plain statements, for each policy, alone and beside others."""

import random
from dataclasses import replace

import pytest
import torch

from tests.draft.test_exact import EOS, MASK, SyntheticModel
from tests.statements.decode import RULES, decode_block
from tests.statements.step import Block
from tests.unmask.torch_policies import EOT, Own, decode, drawn, net, unmasking_net
from vllm_dllm.unmask.registry import BUILT_IN

BLOCKS = 2
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


def request(policy: str, rng: random.Random) -> Own:
    if policy in BUILT_IN:
        return drawn(policy, rng)
    steps = rng.choice([1, 2, 4, 8]) if policy == "dynamic" else rng.choice([1, 2, 3, 4, 5, 8])
    return Own(policy, threshold=rng.choice([0.3, 0.6, 0.9]), steps=steps, seed=rng.randrange(99))


def stated(model: SyntheticModel, own: Own) -> tuple[list[int], int]:
    """Decode a request by the plain statement; its tokens, and the steps it took."""
    length = model.block_length
    options: dict = DEFAULTS | {f"{own.policy}_{name}": value for name, value in own.values}
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


@pytest.mark.parametrize("policy", sorted(RULES))
def test_decodes_are_the_statements(policy: str) -> None:
    rng, wrong, num = random.Random(policy), [], 0
    for seed in range(6):
        model = SyntheticModel([4, 8, 16][seed % 3], seed, [0.5, 3.0, 8.0][seed // 2])
        requests = [request(policy, rng) for _ in range(6)]
        requests = [replace(own, tail=(2, 4, 6)[: i % 3 if seed % 2 else 0]) for i, own in enumerate(requests)]
        for own, its in zip(requests, decode(model, requests, num_blocks=BLOCKS, is_native=seed < 3), strict=True):
            num += 1
            if (its.tokens, its.steps) != (expected := stated(model, own)):
                wrong.append((model.block_length, own, its.tokens, its.steps, expected))
    assert not wrong, f"{len(wrong)} of {num}: {wrong[:2]}"
