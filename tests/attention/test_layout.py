"""Layouts: who sees whom, in numbers; the shape and the addresses of a captured one."""

import numpy as np
import pytest
import torch

from tests.attention.scenes import denoising, ints
from vllm_dllm.attention.layout import (
    CapturedLayout,
    denoise_layout,
    empty_layout,
    forward_layout,
    host_layout,
    lone_layout,
    pad_layout,
)


def test_canvases_of_a_request_see_its_row_but_the_block() -> None:
    host = denoise_layout(ints(3, 16), ints(11, 24), num_nodes=3, block_length=4)
    assert host.first_node.tolist() == [0, 3, 6]
    assert host.first_row.tolist() == [0, 4, 8, 12, 16, 20, 24]
    assert host.context.tolist() == [[0, 3, 7, 11]] * 3 + [[0, 16, 20, 24]] * 3
    assert (host.num_requests, host.num_nodes) == (2, 6)
    assert host.own_len.tolist() == [4] * 6
    assert host.context_len.tolist() == [7] * 3 + [20] * 3


def test_a_step_of_nobody_is_empty() -> None:
    assert (empty_layout().num_requests, empty_layout().num_nodes) == (0, 0)


def test_rows_of_nobody_see_each_other() -> None:
    host = lone_layout(13)
    assert (host.num_requests, host.first_row.tolist(), host.context_len.tolist()) == (1, [0, 13], [0])


def test_padding_sees_only_itself() -> None:
    padded = pad_layout(denoising(2, 4), num_rows=44, num_requests=7, block_length=4)
    assert padded.first_node.tolist() == [0, 2, 4, 6, 8, 11, 11, 11]
    assert padded.first_row.tolist() == list(range(0, 45, 4))
    assert padded.context_len[8:].tolist() == [0, 0, 0]
    assert np.array_equal(padded.context[:8], denoising(2, 4).context)


def test_requests_with_different_nodes_are_padded_alike() -> None:
    context = np.array([[0, 8, 12, 12], [0, 4, 8, 8], *[[0, 20, 24, 24]] * 3])
    host = host_layout(ints(2, 3), np.full(5, 4), context, np.array([False, True, False, False, True]))
    padded = pad_layout(host, num_rows=32, num_requests=4, block_length=4)
    assert padded.is_causal.tolist() == [0, 1, 0, 0, 1, 0, 0, 0]
    assert padded.first_node.tolist() == [0, 2, 5, 8, 8]
    assert padded.first_row.tolist() == list(range(0, 33, 4))
    assert padded.context[:5].tolist() == host.context.tolist()
    assert padded.context_len[5:].tolist() == [0, 0, 0]


@pytest.mark.parametrize("num_reqs", [0, 1, 5])
def test_a_captured_shape_is_decided_by_rows_alone(num_reqs: int) -> None:
    buffers = CapturedLayout(
        max_num_requests=5, max_num_nodes=9, max_pages=3, block_length=8, heads_per_kv=1, device=torch.device("cpu")
    )
    start = np.arange(num_reqs, dtype=np.int64)
    page_table = torch.arange(num_reqs * 4, dtype=torch.int32).view(num_reqs, 4)  # wider than any row needs
    shapes, addresses = set(), set()
    for count in (num_reqs, 0):
        host = denoise_layout(start[:count], start[:count] + 8, num_nodes=1, block_length=8)
        pages = page_table[: host.num_requests]
        layout = buffers.fill(host, pages, num_rows=56, page_size=16)
        tensors = (layout.page_table, layout.first_node, layout.first_row, layout.context, layout.is_causal)
        shapes.add(tuple(tensor.shape for tensor in tensors))
        addresses.add(tuple(tensor.data_ptr() for tensor in tensors))
        assert torch.equal(layout.page_table[: len(pages)], pages[:, :3])
        assert layout.first_node[-1] == 7
        assert layout.first_row.tolist() == list(range(0, 57, 8))
    assert shapes == {((6, 3), (7,), (8,), (7, 4), (7,))}
    assert len(addresses) == 1
    assert layout.context.data_ptr() % 16 == 0


def test_the_largest_captured_step_fits() -> None:
    buffers = CapturedLayout(
        max_num_requests=2, max_num_nodes=6, max_pages=2, block_length=8, heads_per_kv=1, device=torch.device("cpu")
    )
    host = denoise_layout(ints(3, 9), ints(11, 17), num_nodes=3, block_length=8)
    layout = buffers.fill(host, torch.ones((2, 2), dtype=torch.int32), num_rows=48, page_size=16)
    assert layout.first_node.tolist() == [0, 3, 6, 6]
    assert layout.context.tolist() == host.context.tolist()


def test_a_layout_travels_as_it_is() -> None:
    host = denoising(2)
    table = torch.zeros((4, 6), dtype=torch.int32)
    layout = forward_layout(host, table, 16, heads_per_kv=1)
    assert layout.page_table is table
    for name in ("first_node", "first_row", "context", "is_causal"):
        assert getattr(layout, name).dtype == torch.int32
        assert np.array_equal(getattr(layout, name).numpy(), getattr(host, name))
