"""Arrays by slot are as large as the largest that a slot has, whatever there was before."""

import numpy as np
import torch

from vllm_dllm.state.edits import SlotTable

NUM_SLOTS, PADDING = 4, 99
CPU = torch.device("cpu")


def arrays(table: SlotTable) -> list[list[int]]:
    """What the device has of each slot, without padding."""
    return [
        [] if (found := table.of(torch.tensor([slot]), np.array([slot]))) is None else found[0].tolist()
        for slot in range(NUM_SLOTS)
    ]


def test_what_a_large_array_needed_is_given_back_when_its_slot_has_another() -> None:
    table = SlotTable(NUM_SLOTS, 1, PADDING, np.int64, CPU)
    kept = {0: [1, 2, 3], 1: [4]}
    for slot, values in kept.items():
        table.put(slot, values)
    for values in (list(range(50_000)), [5, 6], []):
        table.put(2, values)
        table.copy()
        assert arrays(table) == [kept[0], kept[1], values, []]
        assert table._tensor.nbytes == NUM_SLOTS * max(3, len(values)) * 8
    for slot in kept:
        table.put(slot, [])
    table.copy()
    assert (arrays(table), table._tensor.nbytes) == ([[]] * NUM_SLOTS, 0)


def test_each_dimension_is_as_large_as_needed() -> None:
    table = SlotTable(NUM_SLOTS, 2, PADDING, np.int64, CPU)
    table.put(0, np.zeros((2, 7)))
    table.put(1, np.ones((5, 3)))
    table.copy()
    assert table._tensor.nbytes == NUM_SLOTS * 5 * 7 * 8
    table.put(0, np.zeros((1, 4)))
    table.put(1, np.zeros((0, 9)))
    table.copy()
    assert (arrays(table), table._tensor.nbytes) == ([[[0] * 4], [], [], []], NUM_SLOTS * 4 * 8)
    assert table.has_any(torch.arange(NUM_SLOTS)).tolist() == [True, False, False, False]
