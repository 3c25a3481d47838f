"""Tables of schedules against the published loops, which count steps."""

import pytest
import torch

from vllm_dllm.unmask.schedule import UnmaskRules, count_table, reveal_times

SIZES = [(block_length, steps) for block_length in [*range(1, 10), 32, 33] for steps in range(1, block_length + 1)]
"""Block lengths, each with every number of steps."""


def taken(table: tuple[int, ...], block_length: int, tail: int = 0) -> list[int]:
    """Follow a table from an untouched block; the counts of its steps."""
    left, counts = block_length - tail, []
    while left > 0:
        counts.append(min(table[block_length - tail - left], left))
        left -= counts[-1]
    return counts


def dream_counts(block_length: int, steps: int, begin: int) -> list[int]:
    """Count as `diffusion_generate` does, by tensors; from step `begin` on, before which as many are unmasked."""
    times = torch.linspace(1, 1e-3, steps + 1)
    left, counts = torch.tensor(block_length - begin), []
    for step in range(begin, steps):
        share = left.float() * (1 - times[step + 1] / times[step])
        counts.append(int(share) if step < steps - 1 else int(left))
        left = left - counts[-1]
    return counts


def test_even_steps_take_the_remainder_first() -> None:
    for block_length, steps in SIZES:
        counts = [block_length // steps + (step < block_length % steps) for step in range(steps)]
        table = count_table(UnmaskRules(), block_length, steps)
        assert len(table) == block_length
        assert taken(table, block_length) == counts


def test_a_block_with_a_tail_takes_the_steps_of_a_whole_one() -> None:
    assert taken(count_table(UnmaskRules(), 8, 3), 8, tail=3) == [3, 2]
    assert taken(count_table(UnmaskRules(), 8, 8), 8, tail=7) == [1]


def test_timesteps_leave_out_steps_that_unmask_nothing() -> None:
    for block_length, steps in SIZES:
        expected = [count for count in dream_counts(block_length, steps, 0) if count]
        assert taken(count_table(UnmaskRules("timesteps"), block_length, steps), block_length) == expected


def test_timesteps_behind_a_position_alone() -> None:
    for block_length, steps in SIZES:
        rest = dream_counts(block_length, steps, 1) if steps > 1 else [block_length - 1]
        expected = [1] + [count for count in rest if count]
        assert taken(count_table(UnmaskRules("timesteps", True), block_length, steps), block_length) == expected


@pytest.mark.parametrize("size", [8, 33, 128])
def test_dreams_schedule_ends_with_two(size: int) -> None:
    """With as many steps as positions the first step has nothing to do."""
    assert taken(count_table(UnmaskRules("timesteps"), size, size), size) == [1] * (size - 2) + [2]


def test_times_end_with_the_last_step() -> None:
    times = torch.linspace(1, 1e-3, 6).tolist()
    assert reveal_times(7, 5) == (*times[1:5], 0.0, 0.0, 0.0)
    assert reveal_times(3, 1) == (0.0, 0.0, 0.0)
