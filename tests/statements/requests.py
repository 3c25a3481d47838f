"""Requests of each policy, and what the statements make of them."""

import random
from collections.abc import Callable
from dataclasses import replace

from tests.draft.test_exact import EOS, MASK, VOCAB
from tests.statements.decode import Forward, decode_block
from tests.statements.step import Block
from tests.unmask.torch_policies import EOT, Own, drawn, net, unmasking_net
from vllm_dllm.state.request_params import RequestParams
from vllm_dllm.unmask.registry import BUILT_IN, changes_tokens
from vllm_dllm.unmask.schedule import UnmaskRules

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


def request(policy: str, rng: random.Random) -> Own:
    """Draw a request, of a policy that draws tokens sometimes at a temperature."""
    temperature = 0.0 if changes_tokens(policy) else rng.choice([0.0, 0.0, 0.7, 1.3])
    return replace(_greedy(policy, rng), temperature=temperature)


def _greedy(policy: str, rng: random.Random) -> Own:
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


def stated(
    own: Own,
    length: int,
    num_blocks: int,
    forward_of: Callable[[int, list[int]], Forward],
    *,
    start: int = 0,
    ends: tuple[int, int] = (EOS, EOT),
) -> tuple[list[int], int]:
    """Decode a request by the plain statement.

    Args:
        own: the request.
        length: of a block.
        num_blocks: of the reply, its prompt's end included.
        forward_of: makes of a block's number, and the tokens of the blocks before it, what maps canvases to logits.
        start: of the first block in the sequence.
        ends: EOS and the end of turn.

    Returns: its tokens, and the steps it took.
    """
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
    for number in range(num_blocks):
        canvas = known + [MASK] * (length - len(known))
        block = Block(
            mask=MASK, given=[token != MASK for token in canvas], steps=min(own.steps, length),
            all_steps=min(own.steps, length) * num_blocks, begin=number * length - len(own.tail),
            start=start + number * length, decided=taken, reply=num_blocks * length - len(own.tail), seed=own.seed,
            temperature=own.temperature, eos=ends[0], end_of_turn=ends[1],
        )  # fmt: skip
        done, steps = decode_block(own.policy, block, canvas, forward_of(number, tokens), options, memory)
        tokens, taken, known = tokens + done, taken + steps, []
    return tokens, taken
