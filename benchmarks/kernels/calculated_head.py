"""What the LM head does on a GPU, counted and not measured: `python -m benchmarks.kernels.calculated_head`.

The product of a step's rows with the head's bfloat16 weight, some rows at a time, and what is written and read of the
logits. `before`: chunks sized for the float64 of the torch twin, logits in bfloat16, gathered whole from all ranks.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from vllm_dllm.draft.graph import MAX_CANDIDATES
from vllm_dllm.measure.report import Row, Section, to_markdown
from vllm_dllm.unmask.head import NATIVE_ROWS, TORCH_BYTES

BYTES_PER_S, FLOPS = 4.3e12, 790e12  # of an H200
TILE_ROWS = 128
NUM_NUMBERS = 2 * MAX_CANDIDATES + 5  # float64 of a row that a rank hands on


@dataclass(frozen=True, slots=True)
class Shape:
    """An LM head, and a step's rows."""

    model: str
    vocab_size: int
    hidden_size: int
    num_rows: int


@dataclass(frozen=True, slots=True)
class Work:
    """What the product takes."""

    num_products: int
    bytes_moved: int  # weights, and logits written and read
    rows_computed: int  # in whole tiles

    def ms(self, shape: Shape) -> float:
        """Return the larger of what memory and arithmetic take, of all products together."""
        flops = 2 * self.rows_computed * shape.vocab_size * shape.hidden_size
        return 1e3 * max(self.bytes_moved / BYTES_PER_S, flops / FLOPS)


def work(shape: Shape, chunk_rows: int, logit_bytes: int) -> Work:
    """Return what chunks of so many rows take."""
    chunks = [min(chunk_rows, shape.num_rows - begin) for begin in range(0, shape.num_rows, chunk_rows)]
    weights = len(chunks) * shape.vocab_size * shape.hidden_size * 2
    logits = 2 * shape.num_rows * shape.vocab_size * logit_bytes
    return Work(len(chunks), weights + logits, sum(-(-rows // TILE_ROWS) * TILE_ROWS for rows in chunks))


def rows() -> Iterator[Row]:
    """Yield the table."""
    for model, vocab_size, hidden_size in (("LLaDA-8B", 126_464, 4096), ("SDAR-8B", 151_936, 4096)):
        for num_rows in (32, 128, 192, 352, 2048):
            shape = Shape(model, vocab_size, hidden_size, num_rows)
            before = work(shape, TORCH_BYTES // (8 * vocab_size), 2)
            after = work(shape, NATIVE_ROWS, 4)
            gathered = num_rows * vocab_size * 2, num_rows * NUM_NUMBERS * 8
            yield {
                "model": model,
                "rows": num_rows,
                "products": f"{before.num_products} → {after.num_products}",
                "rows computed": f"{before.rows_computed} → {after.rows_computed}",
                "GB": f"{before.bytes_moved / 1e9:.2f} → {after.bytes_moved / 1e9:.2f}",
                "ms": f"{before.ms(shape):.2f} → {after.ms(shape):.2f}",
                "gathered MB": f"{gathered[0] / 1e6:.1f} → {gathered[1] / 1e6:.2f}",
            }


def table() -> str:
    """Return the table of docs/benchmarks.md."""
    lines = to_markdown([Section("", list(rows()))]).splitlines()
    return "\n".join(line for line in lines if line.startswith("|"))


if __name__ == "__main__":
    print(table())
