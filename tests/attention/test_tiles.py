"""What the CUDA kernel's CTAs work on: tiles, and among how many a context is divided."""

import dataclasses
import re

import numpy as np
import pytest
import torch

from tests.attention.scenes import captured, denoising, ints, make_scene, mixed
from vllm_dllm.attention.csrc import CsrcAttention, check_layout
from vllm_dllm.attention.interface import Heads
from vllm_dllm.attention.layout import ForwardLayout, denoise_layout, empty_layout, host_layout
from vllm_dllm.attention.tiles import max_num_tiles, num_splits, query_tiles

H200 = 132


def test_tiles_of_requests_begin_anew() -> None:
    host = host_layout(ints(2, 0, 3), ints(20, 0, 1, 3, 30), np.zeros((5, 4), dtype=np.int64))
    assert query_tiles(host, 4).tolist() == [
        [0, 0, 0, 20, 0, 1, 0, 0],
        [0, 64, 0, 20, 0, 1, 0, 0],
        [2, 0, 20, 54, 2, 5, 0, 0],
        [2, 64, 20, 54, 4, 5, 0, 0],
        [2, 128, 20, 54, 4, 5, 0, 0],
    ]


def test_rows_of_nobody_have_tiles_without_nodes() -> None:
    assert query_tiles(empty_layout(), 2, 40).tolist() == [[0, 0, 0, 40, 0, 0, 0, 0], [0, 64, 0, 40, 0, 0, 0, 0]]
    assert query_tiles(empty_layout(), 2).shape == (0, 8)


@pytest.mark.parametrize("heads_per_kv", [1, 4, 7])
@pytest.mark.parametrize("block_length", [4, 8, 32])
def test_a_captured_shape_has_room_for_all_tiles(heads_per_kv: int, block_length: int) -> None:
    """Whatever requests the blocks of a captured step belong to; where blocks fill tiles, no more than that."""
    num_blocks, max_num_requests = 23, 6
    most = max_num_tiles(num_blocks * block_length, max_num_requests, block_length, heads_per_kv)
    random, found = np.random.default_rng(0), 0
    for _ in range(300):
        cuts = np.sort(random.integers(0, num_blocks + 1, max_num_requests - 1))
        num_nodes = np.diff(np.concatenate([[0], cuts, [num_blocks]]))
        host = host_layout(num_nodes, np.full(num_blocks, block_length), np.zeros((num_blocks, 4), dtype=np.int64))
        found = max(found, len(query_tiles(host, heads_per_kv)))
    assert found <= most
    assert most == found or block_length * heads_per_kv % 64


@pytest.mark.parametrize(
    ("num_rows", "num_kv_heads", "max_span", "splits"),
    [
        (32, 32, 1024, 8),  # LLaDA-8B alone, without drafts and with three
        (128, 32, 1024, 4),
        (192, 32, 1024, 2),
        (320, 32, 4096, 1),  # enough CTAs for every multiprocessor
        (8, 8, 1024, 8),  # SDAR-8B alone: a split has 128 positions at least
        (8, 8, 4096, 32),
        (1, 1, 10**6, 32),
        (8, 8, 0, 1),  # who only stores divides nothing
        (0, 8, 4096, 32),
    ],
)
def test_contexts_are_divided_to_fill_the_gpu_once(
    num_rows: int, num_kv_heads: int, max_span: int, splits: int
) -> None:
    assert num_splits(num_rows, 32, num_kv_heads, max_span, H200) == splits
    assert splits == 1 or num_rows * 32 // 64 * splits <= 2 * H200


def test_the_workspace_is_never_more_than_what_was_profiled() -> None:
    query = torch.empty(1, 32, 128, device="meta")
    profiled = CsrcAttention.temporary_bytes(query, 10**6)
    assert profiled < 10 << 20
    for num_rows, num_kv_heads in [(1, 1), (8, 8), (64, 8), (128, 32), (200, 2), (5000, 1)]:
        host = denoise_layout(ints(10**5), ints(10**6), num_nodes=1, block_length=num_rows)
        splits = num_splits(num_rows, 32, num_kv_heads, host.span, H200)
        assert splits == 1 or 4 * splits * num_rows * 32 * 130 <= profiled


def test_the_span_is_that_of_nodes_with_rows() -> None:
    context = np.array([[0, 9, 20, 31], [5, 5, 7, 40], [3, 30, 0, 0], [0, 900, 0, 0]])
    spans = [host_layout(ints(1), ints(2), context[i : i + 1]).span for i in range(3)]
    assert spans == [31, 33, 27]
    assert host_layout(ints(4), ints(1, 1, 1, 0), context).span == 33
    assert empty_layout().span == 0


def test_the_splits_of_a_captured_graph_do_not_follow_its_steps() -> None:
    heads = Heads(4, 2, 32, 0.3, torch.bfloat16)
    attention = CsrcAttention(heads, torch.zeros(1, 2, 16, 64))
    scene = make_scene(denoising(2, 4))
    rooms = [
        dataclasses.replace(scene.layout, tiles=torch.zeros(3, 8).int(), max_span=span) for span in (0, 1024, 10**5)
    ]
    assert [attention.plan(layout).num_splits for layout in rooms] == [1, 8, 32]


def with_tiles(layout: ForwardLayout, heads_per_kv: int) -> ForwardLayout:
    return dataclasses.replace(layout, tiles=torch.from_numpy(query_tiles(layout.host, heads_per_kv)))


WRONG: dict[str, tuple[str, tuple[int, ...], int, str]] = {
    "page": ("page_table", (2, 0), 99, "page_table[2][0] is 99, the cache has pages 0 to 30 and node 2 sees that page"),
    "interval": ("context", (4, 3), 5000, "context of node 4 has the interval [17, 5000), allowed are positions 0 to"),
    "order": ("context", (0, 2), 12, "context of node 0 has the interval [12, 41), allowed are positions 33 to"),
    "node": ("first_node", (2,), 1, "first_node must ascend to at most 6, got 1 after 2"),
    "row": ("first_row", (3,), 7, "first_row must ascend to at most 27, got 7 after 8"),
    "causal": ("is_causal", (1,), 7, "is_causal[1] is 7, allowed are 0 and 1"),
    "tile": ("tiles", (1, 2), 3, "tiles[1] is query 0 of request 2 with rows [3, 14)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_value_is_named_before_it_is_read(name: str) -> None:
    field, place, value, message = WRONG[name]
    layout = with_tiles(make_scene(mixed()).layout, 2)
    assert len(layout.page_table) == 4
    check_layout(layout, num_pages=31, heads_per_kv=2)
    broken = getattr(layout, field).clone()
    broken[place] = value
    with pytest.raises(RuntimeError, match=re.escape(message)):
        check_layout(dataclasses.replace(layout, **{field: broken}), num_pages=31, heads_per_kv=2)


def test_a_padded_layout_passes_the_check() -> None:
    scene = make_scene(denoising(3, 4))
    padded = captured(scene, num_rows=4 * 20, block_length=4, max_num_requests=7).layout
    check_layout(with_tiles(padded, 2), num_pages=len(scene.kv_cache), heads_per_kv=2)
