"""Contestants take turns, floors follow from counts, and peaks of memory are seen."""

import pytest
import torch

from benchmarks.kernels.attention import AttentionShape
from benchmarks.kernels.floor import Rates, load_multiply_adds
from benchmarks.kernels.memory import peak_bytes
from benchmarks.kernels.turns import COLD_BYTES, num_data_sets, ratio, take_turns
from benchmarks.kernels.vocab import VocabShape
from vllm_dllm.ops.library import cpu_isa

CPU = torch.device("cpu")


def test_contestants_take_turns_on_each_data_set():
    calls = []
    contestants = {name: lambda number, name=name: calls.append((name, number)) for name in "abc"}
    times = take_turns(contestants, num_sets=2, num_rounds=2, device=CPU)
    assert [name for name, number in calls[3:] if number == 1] == ["a", "b", "c", "b", "c", "a"]
    assert calls[:3] == [("a", 0), ("b", 0), ("c", 0)], "each is warm before the first round"
    assert {name: len(values) for name, values in times.items()} == {"a": 2, "b": 2, "c": 2}


def test_ratios_are_of_the_same_round():
    spread = ratio({"a": [2.0, 9.0, 4.0], "b": [1.0, 3.0, 4.0]}, "a", "b")
    assert (spread.least, spread.median, spread.most) == (1.0, 2.0, 3.0)


def test_rounds_read_more_than_a_cache():
    assert num_data_sets(1 << 30) == 1
    assert num_data_sets(COLD_BYTES // 5) == 6
    assert num_data_sets(COLD_BYTES // 5 + 1) == 5


def test_floor_is_the_slower_of_memory_and_arithmetic():
    rates = Rates(bytes_per_s=1e9, flops_per_s=1e10)
    assert rates.floor_ms(num_bytes=2e6, num_flops=1e7) == pytest.approx(2.0)
    assert rates.floor_ms(num_bytes=2e6, num_flops=1e8) == pytest.approx(10.0)


@pytest.mark.parametrize("is_bfloat16", [False, True])
def test_operations_are_counted(is_bfloat16):
    lanes = {"portable": 4, "avx2": 8, "avx512": 16, "avx512_bf16": 16}[cpu_isa()]
    has_pairs = is_bfloat16 and cpu_isa() == "avx512_bf16"
    per_round = 12 * lanes * (4 if has_pairs else 2)
    assert load_multiply_adds()(7, is_bfloat16) == 7 * per_round * torch.get_num_threads()


def test_floor_of_attention():
    """Two requests of two nodes of 3 rows see 64 stored positions and their own 3."""
    shape = AttentionShape(4, 2, 32, torch.bfloat16, 64, 3, 1, 2)
    stored = 2 * 64 * 2 * 2 * 32 * 2
    rows = 12 * (4 + 2 + 2 + 4) * 32 * 2  # query, key, value, out
    assert shape.floor_ms(Rates(1e3, 1e30)) == pytest.approx(stored + rows)
    products = 12 * 4 * 2 * (2 * 32 * 67)
    assert shape.floor_ms(Rates(1e30, 1e3)) == pytest.approx(products)


def test_floor_of_vocab_stats():
    shape = VocabShape(100, 7, 3, torch.float32)
    assert shape.floor_ms(Rates(1e3, 1e30)) == pytest.approx(100 * 7 * 4)
    assert shape.floor_ms(Rates(1e30, 1e3)) == pytest.approx(2 * 3 * 100 * 7)


def test_peak_counts_what_a_call_frees_again():
    num_bytes, counted_late = 64 << 20, 1 << 20

    def work() -> None:
        torch.ones(num_bytes // 4).sum()

    assert num_bytes - counted_late <= peak_bytes(work, CPU) < 1.25 * num_bytes
    assert peak_bytes(lambda: None, CPU) <= counted_late
