"""What is calculated of attention on a GPU: the documented table is what the code says."""

from pathlib import Path

from benchmarks.kernels.calculated import after, before, shapes, table
from vllm_dllm.attention.tiles import query_tiles

DOCS = Path(__file__).parents[2] / "docs" / "benchmarks.md"


def test_the_documented_table_is_the_calculated_one() -> None:
    assert table() in DOCS.read_text()


def test_no_tile_is_without_a_cta() -> None:
    for shape in shapes():
        tiles = len(query_tiles(shape.layout(), shape.num_heads // shape.num_kv_heads))
        assert tiles * shape.num_kv_heads <= after(shape).num_busy <= after(shape).num_ctas
        assert before(shape).num_busy <= before(shape).num_ctas


def test_a_lone_request_is_faster_and_a_batch_moves_less() -> None:
    for shape in shapes():
        if shape.num_requests == 1:
            assert after(shape).longest < before(shape).longest / 3
        if after(shape).num_launches == 1:
            assert after(shape).workspace_bytes == 0 < before(shape).workspace_bytes
