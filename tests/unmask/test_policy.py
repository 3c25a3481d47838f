"""The batched policies against the reference's rules, one request at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_dllm.reference.policy import factor_count, static_counts, threshold_count
from vllm_dllm.unmask.policy import POLICY_IDS, PolicyParams, choose_positions, num_to_unmask


def params(policy: str, *, threshold: float = 0.9, factor: float = 1.0, steps: int = 1) -> PolicyParams:
    return PolicyParams(
        policy_id=torch.tensor([POLICY_IDS[policy]]),
        threshold=torch.tensor([threshold], dtype=torch.float64),
        factor=torch.tensor([factor], dtype=torch.float64),
        steps_per_block=torch.tensor([steps]),
    )


def count(policy: PolicyParams, confidence: list[float], block_length: int) -> int:
    """Count for one request whose masked positions have the given descending confidences."""
    padded = torch.full((1, block_length), -torch.inf, dtype=torch.float64)
    padded[0, : len(confidence)] = torch.tensor(confidence, dtype=torch.float64)
    return int(num_to_unmask(padded, torch.tensor([len(confidence)]), policy))


descending = st.lists(
    st.one_of(st.floats(0, 1), st.sampled_from([0.5, 2 / 3, 0.75, 0.9, 1.0])), min_size=1, max_size=12
).map(lambda values: sorted(values, reverse=True))


@settings(max_examples=300, deadline=None)
@given(confidence=descending, room=st.integers(0, 4), factor=st.sampled_from([0.1, 0.5, 1.0, 2.0]))
def test_factor_equals_reference(confidence: list[float], room: int, factor: float) -> None:
    expected = factor_count(torch.tensor(confidence, dtype=torch.float64), factor)
    assert count(params("factor", factor=factor), confidence, len(confidence) + room) == expected


@settings(max_examples=300, deadline=None)
@given(confidence=descending, room=st.integers(0, 4), threshold=st.sampled_from([0.5, 2 / 3, 0.9, 1.0]))
def test_threshold_equals_reference(confidence: list[float], room: int, threshold: float) -> None:
    expected = threshold_count(torch.tensor(confidence, dtype=torch.float64), threshold)
    assert count(params("threshold", threshold=threshold), confidence, len(confidence) + room) == expected


@pytest.mark.parametrize(("block_length", "steps"), [(8, 8), (8, 3), (32, 5), (7, 2), (1, 1)])
@pytest.mark.parametrize("policy", ["static", "random"])
def test_schedule_equals_reference(policy: str, block_length: int, steps: int) -> None:
    left, counts = block_length, []
    for _ in range(steps):
        counts.append(count(params(policy, steps=steps), [0.5] * left, block_length))
        left -= counts[-1]
    assert counts == static_counts(block_length, steps)
    assert left == 0


def test_equal_confidences_go_to_the_lowest_position() -> None:
    confidence = torch.tensor([[0.5, 0.9, 0.5, 0.9, 0.9]], dtype=torch.float64)
    is_masked = torch.tensor([[True, False, True, True, True]])
    chosen = choose_positions(confidence, is_masked, params("static", steps=2))
    assert chosen.tolist() == [[True, False, False, True, True]]


def test_only_masked_positions_are_chosen() -> None:
    confidence = torch.ones(1, 4, dtype=torch.float64)
    is_masked = torch.tensor([[False, True, False, False]])
    chosen = choose_positions(confidence, is_masked, params("static", steps=1))
    assert chosen.tolist() == is_masked.tolist()


def test_policies_do_not_see_their_neighbours() -> None:
    confidence = torch.rand(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    is_masked = torch.rand(4, 8, generator=torch.Generator().manual_seed(1)) < 0.6
    is_masked[:, 0] = True
    mixed = PolicyParams(
        policy_id=torch.arange(4),
        threshold=torch.full((4,), 0.6, dtype=torch.float64),
        factor=torch.full((4,), 1.5, dtype=torch.float64),
        steps_per_block=torch.tensor([3, 2, 1, 1]),
    )
    together = choose_positions(confidence, is_masked, mixed)
    for i, name in enumerate(POLICY_IDS):
        alone = params(name, threshold=0.6, factor=1.5, steps=[3, 2, 1, 1][i])
        expected = choose_positions(confidence[i : i + 1], is_masked[i : i + 1], alone)
        assert together[i].tolist() == expected[0].tolist(), name
