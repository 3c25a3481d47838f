"""One step of the reference loop: the published rules as scalars, the additions as their text has them."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from vllm_dllm.noise import stream_keys
from vllm_dllm.reference.policy import (
    LLADA,
    Block,
    UnmaskPolicy,
    factor_count,
    rank_positions,
    static_counts,
    threshold_count,
    unmask,
)
from vllm_dllm.reference.sampling import Sampling, choose_tokens, kept_tokens

EOS, EOT = 1, 6


def make_block(length: int, count: int, **changes: object) -> Block:
    """Make a block at position 0 whose first step unmasks `count` positions by the schedule."""
    values = {"policy": UnmaskPolicy(), "sampling": Sampling(), "rules": LLADA}
    return Block(begin=0, length=length, num_masked=length, steps=-(-length // count), eos_id=EOS, **(values | changes))


def step_logits(logits: Tensor, count: int | None = None, **changes: object) -> tuple[list[int], list[int]]:
    """Run `unmask` on a block whose positions are all masked; by the schedule it unmasks `count` of them, or all."""
    block = make_block(len(logits), count or len(logits), **changes)
    positions, tokens = unmask(logits, torch.ones(len(logits), dtype=torch.bool), first=0, block=block)
    return positions.tolist(), tokens.tolist()


def test_static_counts_sum_and_fall():
    for num_masked, steps in itertools.product((1, 7, 32, 33), (1, 3, 32, 40)):
        counts = static_counts(num_masked, steps)
        assert len(counts) == steps
        assert sum(counts) == num_masked
        assert counts == sorted(counts, reverse=True)
        assert counts[0] - counts[-1] <= 1


def scalar_factor(confidence: list[float], factor: float) -> int:
    """The published loop, word for word in its effect: `j` stays at the last index when nothing fails."""
    bounds = [1 - factor / (n + 1) for n in range(1, len(confidence) + 1)]
    bounds[0] = -1
    for j in range(len(bounds)):
        if confidence[j] < bounds[j]:
            break
    if j in (0, len(bounds) - 1):
        j += 1
    return j


def test_factor_equals_scalar_rule():
    for num_masked, factor, power in itertools.product((1, 2, 3, 7, 32), (0.25, 1.0, 2.5), (0.05, 0.3, 2.0)):
        confidence = torch.rand(20, num_masked, dtype=torch.float64).pow(power).sort(descending=True).values
        for row in confidence:
            assert factor_count(row, factor) == scalar_factor(row.tolist(), factor)


@pytest.mark.parametrize(
    ("confidence", "count"),
    [
        ([0.01], 1),  # a single position
        ([0.9, 0.1, 0.1, 0.1], 1),  # fails at once: bounds are -1, 2/3, 3/4, 4/5
        ([0.9, 0.8, 0.1, 0.1], 2),
        ([0.9, 0.8, 0.76, 0.1], 4),  # fails at the last position, and still takes all
        ([0.9, 0.9, 0.9, 0.9], 4),
        ([0.9, 0.1], 2),  # the second position is the last one
    ],
)
def test_factor_quirks(confidence, count):
    assert factor_count(torch.tensor(confidence), 1.0) == count


@pytest.mark.parametrize(
    ("confidence", "count"), [([0.95, 0.9, 0.5], 2), ([0.2, 0.1, 0.1], 1), ([0.9, 0.9, 0.9], 3), ([0.0], 1)]
)
def test_threshold_keeps_equal_and_the_first(confidence, count):
    assert threshold_count(torch.tensor(confidence), 0.9) == count


def eos_logits() -> Tensor:
    """Three positions whose best tokens are EOS, EoT and 9, in falling certainty."""
    logits = torch.zeros(3, 12)
    logits[0, EOS], logits[1, EOT], logits[2, 9] = 9.0, 8.0, 7.0
    return logits


def test_logits_eos_inf_removes_the_token():
    positions, tokens = step_logits(eos_logits(), sampling=Sampling(logits_eos_inf=True))
    assert EOS not in tokens
    assert positions == [1, 2, 0]


def test_confidence_flag_at_temperature_zero_lowers_both():
    policy = UnmaskPolicy(confidence_eos_eot_inf=True, eot_id=EOT)
    positions, tokens = step_logits(eos_logits(), policy=policy)
    assert positions == [2, 0, 1]
    assert tokens == [9, EOS, EOT]


def test_confidence_flag_above_zero_lowers_eot_alone():
    policy = UnmaskPolicy(confidence_eos_eot_inf=True, eot_id=EOT)
    positions, tokens = step_logits(eos_logits(), policy=policy, sampling=Sampling(temperature=0.01))
    assert positions == [0, 2, 1]
    assert tokens == [EOS, 9, EOT]


def test_forbidden_ids_leave_the_softmax():
    """The confidence renormalises over the allowed tokens, and so may reorder the positions."""
    logits = torch.tensor([[5.0, 4.0, 0.0], [0.0, 1.0, 4.9]])
    assert step_logits(logits) == ([1, 0], [2, 0])
    assert step_logits(logits, sampling=Sampling(forbidden_ids=(1,))) == ([0, 1], [0, 2])


def test_equal_confidences_go_by_position():
    assert step_logits(torch.zeros(32, 5), count=3) == ([0, 1, 2], [0, 0, 0])
    confidence = torch.tensor([0.5, 0.9, 0.5, 0.9, 0.1])
    assert rank_positions(confidence, 4, "position").tolist() == [1, 3, 0, 2]


@pytest.mark.parametrize(("name", "num_ranked", "count"), [("static", 5, 5), ("threshold", 32, 1)])
def test_torch_ties_are_those_of_topk_over_the_span(name, num_ranked, count):
    """The tensor has the length of the span, -inf outside the block; the threshold rule ranks all its masks."""
    logits, is_masked = torch.zeros(40, 5), torch.arange(40) >= 8
    policy = UnmaskPolicy(name, tie_break="torch", confidence_dtype=torch.float64)
    block = Block(8, 32, 32, steps=7, policy=policy, sampling=Sampling(), rules=LLADA, eos_id=EOS)
    positions, _ = unmask(logits, is_masked, first=0, block=block)
    published = torch.where(is_masked, torch.full((40,), 0.2, dtype=torch.float64), -torch.inf)
    assert torch.equal(positions, published.topk(num_ranked).indices[:count])


def test_confidence_dtype_decides_ties():
    """Two probabilities above 0.998 are one number in bfloat16 and two in float64."""
    logits = torch.zeros(2, 8, dtype=torch.bfloat16)
    logits[0, 2], logits[1, 2] = 12.0, 14.0
    assert step_logits(logits)[0] == [0, 1]
    assert step_logits(logits, policy=UnmaskPolicy(confidence_dtype=torch.float64))[0] == [1, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_samples_follow_the_softmax(temperature):
    """Chi-square over 12,000 draws of different seeds and positions; 7 degrees of freedom, 24.3 is the 99.9 % point."""
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, 0.0, -0.5, -1.0, 1.5])
    seeds, positions = torch.arange(60).repeat_interleave(200), torch.arange(200).repeat(60)
    keys = stream_keys(seeds, positions, torch.tensor(4))
    tokens = choose_tokens(logits.expand(len(keys), -1), keys, Sampling(temperature=temperature))
    expected = (logits.double() / temperature).softmax(-1) * len(keys)
    observed = tokens.bincount(minlength=8)
    assert ((observed - expected).square() / expected).sum().item() < 24.3


def kept(logits: list[float], **options: float) -> list[int]:
    """Return the ids that a filter leaves."""
    kept = kept_tokens(torch.tensor([logits], dtype=torch.float64), Sampling(temperature=1.0, **options))
    return kept[0].nonzero().flatten().tolist()


def test_filters_keep_what_their_text_says():
    logs = [math.log(p) for p in (0.1, 0.4, 0.1, 0.3, 0.1)]
    assert kept(logs, top_k=1) == [1]
    assert kept(logs, top_k=3) == [0, 1, 2, 3, 4]  # all that equal the third largest
    assert kept(logs, top_k=99) == [0, 1, 2, 3, 4]
    assert kept(logs, top_p=0.39) == [1]
    assert kept(logs, top_p=0.65) == [1, 3]
    assert kept(logs, top_p=0.75) == [0, 1, 3]  # lowest id among equals
    assert kept(logs, top_p=1e-9) == [1]
    assert kept(logs, top_p=0.0) == [1]
    assert kept(logs, top_k=2, top_p=0.57) == [1]  # top_p of what top_k leaves: 4/7 and 3/7
    assert kept(logs, top_p=0.57) == [1, 3]


def test_filters_bound_the_tokens():
    logits = torch.tensor([2.0, 0.0, 1.9, 0.0]).expand(300, -1)
    keys = stream_keys(torch.arange(300), torch.tensor(0), torch.tensor(1))
    hot = {"temperature": 50.0}
    assert set(choose_tokens(logits, keys, Sampling(**hot)).tolist()) == {0, 1, 2, 3}
    assert set(choose_tokens(logits, keys, Sampling(**hot, top_k=2)).tolist()) == {0, 2}
    assert set(choose_tokens(logits, keys, Sampling(**hot, top_p=0.5)).tolist()) == {0, 2}


def test_filters_leave_the_confidence():
    """Position 1 is the surer one without filters; with top_k 1 both would be certain, and position 0 the first."""
    logits = torch.tensor([[2.0, 1.9, 0.0, 0.0], [4.0, -2.0, -2.0, -2.0]])
    assert step_logits(logits, sampling=Sampling(temperature=50.0, top_k=1)) == ([1, 0], [0, 0])
    assert step_logits(logits, sampling=Sampling(top_k=1, top_p=0.1)) == step_logits(logits)
