"""Adapters on a CPU: a row's own adapter, whatever the others of the batch have; rows without one are left alone."""

from typing import Any

import pytest
import torch
from vllm.lora.layers import LoRAMapping

from vllm_dllm.engine.cpu.lora import CpuAdapters

NUM_SLOTS, RANK, SIZES = 2, 3, (4, 2)
"""Slots 0 and 1 have the adapters 11 and 7."""


@pytest.mark.parametrize("ids", [[7, 7, 0, 11, 0, 7], [0, 0, 0, 0, 0, 0], [11, 11, 11, 11, 11, 11], [0, 7, 7, 0, 0]])
def test_each_row_gets_its_own_adapter(ids: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Any:
        return torch.randn(shape, generator=generator)

    num_rows = 6  # one more than the mapping has in the last case: a padded row
    x, y = random(num_rows, 5), random(num_rows, sum(SIZES))
    a, b = [random(NUM_SLOTS, 1, RANK, 5) for _ in SIZES], [random(NUM_SLOTS, 1, size, RANK) for size in SIZES]
    expected = y.clone()
    for row, adapter in enumerate(ids):
        if adapter:
            slot = [11, 7].index(adapter)
            expected[row] += torch.cat([2.0 * b[i][slot, 0] @ (a[i][slot, 0] @ x[row]) for i in range(len(SIZES))])

    punica = CpuAdapters(16, 8, "cpu")
    punica.update_metadata(LoRAMapping((7, 7, 7, 7, 7, 7), (7,), is_prefill=True), [11, 7], NUM_SLOTS, 100)
    punica.update_metadata(LoRAMapping(tuple(ids), tuple(ids), is_prefill=True), [11, 7], NUM_SLOTS, 100)
    punica.add_lora_linear(y, x, tuple(a), tuple(b), 2.0, SIZES)
    torch.testing.assert_close(y, expected)
