"""What is calculated of the LM head on a GPU: the documented table is what the code says."""

from pathlib import Path

from benchmarks.kernels.calculated_head import Shape, table, work
from vllm_dllm.unmask.head import LogitsHead

DOCS = Path(__file__).parents[2] / "docs" / "benchmarks.md"


def test_the_documented_table_is_the_calculated_one() -> None:
    assert table() in DOCS.read_text()


def test_the_products_are_those_that_the_head_makes() -> None:
    shape = Shape("any", 126_464, 4096, 2048)
    for is_native, num_products in ((False, 16), (True, 2)):
        head = LogitsHead(lambda hidden: hidden, shape.vocab_size, 0, is_native=is_native)
        found = work(shape, head.chunk_rows, 2)
        assert found.num_products == num_products
        assert found.rows_computed >= shape.num_rows
