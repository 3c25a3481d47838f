"""What steps take: curves that were measured on a CPU, and for an H200 calculated."""

from collections.abc import Callable
from dataclasses import dataclass

from vllm_dllm.draft.budget import CostCurve
from vllm_dllm.engine.step_sizes import captured_blocks


@dataclass(frozen=True, slots=True)
class Machine:
    """What a step takes, and what was forecast.

    Attributes:
        curve: milliseconds of a step by rows.
        kv_ms: of each request but the first: its K/V, which no curve knows.
        host_ms: between two steps.
        refresh_rows: of a bidirectional model's sequence; of a block-causal one's prompt.
        forecast: what the engine measured at its start; None: the curve.
        noise, accidents: by which share a step is late, as a rule, and how often by 2 to 10 times.
    """

    curve: CostCurve
    kv_ms: float
    host_ms: float
    refresh_rows: int
    forecast: CostCurve | None = None
    noise: float = 0.05
    accidents: float = 0.01

    def ms(self, rows: int, num_reqs: int) -> float:
        """Return what a step takes, nothing being late."""
        return self.curve.ms(rows) + self.kv_ms * (num_reqs - 1)


def captured(block_length: int, ms: Callable[[int], float]) -> CostCurve:
    """Return the staircase of the graphs that the engine captures for up to 64 blocks, and a line behind them."""
    rows = [number * block_length for number in captured_blocks(64)]
    return CostCurve(tuple((number, ms(number)) for number in [*rows, 2 * rows[-1], 8 * rows[-1]]), len(rows))


def roofline(rows: int) -> float:
    """Return what an 8B model's layers and head take at an H200's rates: weights once, then arithmetic."""
    return max(3.6, 0.0198 * rows)


def tiles(rows: int) -> float:
    """Return the same at 0.88 of the bandwidth and 0.72 of the rate, with products in tiles of 128 rows."""
    return max(4.7, 0.0275 * 128 * -(-rows // 128))


BY_BLOCK: dict[int, dict[str, Machine]] = {
    32: {
        # docs/benchmarks.md, never slower: LLaDA of 8.5 M, two threads.
        "CPU, LLaDA 8.5 M": Machine(
            CostCurve(((32, 11.0), (64, 13.0), (128, 17.0), (256, 30.0), (512, 58.0))), 0.0, 2.2, 230
        ),
        # Logged by an engine at its start: examples/tiny_llada, one thread.
        "CPU, tiny_llada": Machine(
            CostCurve(((32, 3.6), (64, 4.8), (96, 6.0), (160, 8.5), (288, 13.2), (352, 15.6), (1408, 80.7))),
            0.0,
            2.2,
            230,
        ),
        # The same machine when others use it: what was logged then, and what is true later.
        "CPU, forecast while busy": Machine(
            CostCurve(((32, 3.6), (64, 4.8), (96, 6.0), (160, 8.5), (288, 13.2), (352, 15.6), (1408, 80.7))),
            0.0,
            2.2,
            230,
            CostCurve(((32, 5.3), (64, 15.1), (96, 12.4), (160, 27.2), (288, 39.9), (352, 42.1), (1408, 74.2))),
            noise=0.2,
        ),
        "H200, LLaDA-8B, roofline": Machine(captured(32, roofline), 0.12, 1.2, 1024),
        "H200, LLaDA-8B, tiles": Machine(captured(32, tiles), 0.12, 1.2, 1024),
    },
    8: {
        "CPU, tiny_sdar": Machine(
            CostCurve(((8, 1.5), (16, 1.5), (24, 1.5), (40, 1.6), (72, 3.1), (104, 3.1), (416, 7.1), (1664, 66.0))),
            0.0,
            2.2,
            100,
        ),
        # docs/benchmarks.md, never slower: 250 M weights, bf16.
        "CPU, memory-bound": Machine(
            CostCurve(((8, 35.0), (16, 37.7), (24, 43.6), (32, 50.1), (40, 54.5))), 0.0, 2.2, 100
        ),
        "H200, SDAR-8B, roofline": Machine(captured(8, roofline), 0.036, 1.2, 1024),
        "H200, SDAR-8B, tiles": Machine(captured(8, tiles), 0.036, 1.2, 1024),
    },
}
"""By block length."""
