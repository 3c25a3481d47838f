"""The CUDA kernel of draft_graph_attention, on the emulator and, where there is one, on a GPU."""

import itertools
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.ops import simt
from tests.ops.attention_cases import (
    Case,
    Heads,
    assert_close,
    expected,
    lse_bound,
    make_case,
    poisoned_results,
    run,
    tiles_of,
)
from vllm_dllm.ops import draft_graph_attention

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HEAD_DIMS = [32, 40, 64, 72, 128, 136, 256]

HOLE = [(0, 33), (41, 70)]
REQUESTS = {
    "canvases": [[(8, HOLE)] * 9],
    "odd": [[(1, [(0, 1)]), (7, [(0, 113)]), (33, [(3, 7), (64, 128)])], [(5, [(63, 65)])]],
    "refresh": [[(150, [])], [(33, [(0, 16)])]],
    "blocks": [[(32, [(0, 32 * i)]) for i in range(4)]],
    "one-row-nodes": [[(1, [(i, 40)]) for i in range(70)]],
    "causal": [[(150, [], True)], [(33, [(0, 16)]), (33, [(0, 90)], True), (5, [(0, 90)], True)]],
    "nothing-seen": [[(0, [(0, 9)]), (3, []), (0, [])], [], [(2, [(5, 5), (9, 9)])]],
}
ALONE = ["odd", "blocks", "causal"]
GROUPS = {"mha": (3, 3), "gqa4": (8, 2), "gqa7": (7, 1)}

SPLIT = [
    [(8, [(0, 1040), (1050, 2300)]), (8, [(0, 1040)], True)],
    [(70, [(1000, 1100)]), (3, [(2200, 2299)]), (4, [])],
]
"""Contexts that are divided differently, splits with nothing, and a node of more rows than a tile."""

Op = Callable[..., None]


@pytest.fixture(params=[simt.WHERE, pytest.param("cuda", marks=pytest.mark.gpu)])
def op(request: pytest.FixtureRequest) -> Op:
    if request.param == "simt":
        native: Op = simt.ops().draft_graph_attention
        return native

    return on_gpu


def on_gpu(*arguments: object) -> None:
    moved = [argument.cuda() if isinstance(argument, torch.Tensor) else argument for argument in arguments]
    draft_graph_attention(*moved)
    for result, given in zip(moved[10:12], arguments[10:12], strict=True):
        if isinstance(given, torch.Tensor):
            given.copy_(result)


def check(op: Op, case: Case, num_splits: int = 1) -> None:
    out, lse = run(op, case.with_garbage(), num_splits)
    by_tensor_cores = op is on_gpu and case.query.dtype != torch.float32
    assert_close(case, out, lse, by_tensor_cores=by_tensor_cores)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_equals_torch_for_every_head_size(op, dtype, head_dim):
    requests = [[(8, HOLE)] * 2 + [(5, [])], [(7, [(3, 50)]), (20, [(0, 90)])]]
    check(op, make_case(Heads(2, 1, head_dim, 16), requests, dtype))


@pytest.mark.parametrize("heads", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("requests", REQUESTS.values(), ids=REQUESTS)
def test_equals_torch_for_every_layout_of_nodes(op, requests, heads):
    check(op, make_case(Heads(*heads, 32, 16), requests, torch.bfloat16))


@pytest.mark.parametrize("page_size", [16, 17, 32, 100, 256])
@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_equals_torch_for_every_layout_of_pages(op, page_size, layout):
    check(op, make_case(Heads(4, 2, 40, page_size), REQUESTS["odd"], torch.float16, layout=layout))


@pytest.mark.parametrize(("num_splits", "dtype"), [(3, torch.float32), (2, torch.bfloat16), (9, torch.float16)])
def test_equals_torch_with_a_split_context(op, dtype, num_splits):
    check(op, make_case(Heads(2, 1, 40, 32), SPLIT, dtype), num_splits)


@pytest.mark.slow("kernels")
@pytest.mark.parametrize("head_dim", [40, 256])
def test_the_bound_of_tensor_cores_tells_a_missing_key(head_dim):
    """It is far above what an emulator's products are off by, and below what most rows lose with one key of 500."""
    torch.manual_seed(3)
    shape = Heads(2, 1, head_dim, 32)
    case = make_case(shape, [[(64, [(0, 500)])]], torch.bfloat16)
    fewer = replace(case, context=make_case(shape, [[(64, [(0, 499)])]], torch.bfloat16).context)
    _, lse = run(simt.ops().draft_graph_attention, case)
    exact, others = (expected(each, torch.float64)[1] for each in (case, fewer))
    bound = lse_bound(case)
    assert bool(((lse - exact).abs() <= bound).all())
    assert ((others - exact).abs() > bound).double().mean() > 0.5


@pytest.mark.parametrize("name", ["odd", "causal", "nothing-seen"])
def test_equals_torch_where_most_splits_have_nothing(op, name):
    check(op, make_case(Heads(4, 2, 32, 16), REQUESTS[name], torch.bfloat16), 32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_splits_with_nothing_change_no_bit(op, dtype):
    """Up to 128 stored positions are the first split's and own rows the last one's, however many are between them."""
    case = make_case(Heads(2, 1, 32, 16), [[(8, [(0, 128)]), (70, [(5, 60), (70, 100)], True)], [(3, [])]], dtype)
    two = run(op, case, 2)
    for num_splits in (3, 32):
        for many, few in zip(run(op, case, num_splits), two, strict=True):
            assert torch.equal(many, few)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_splits", [1, 5])
@pytest.mark.parametrize("requests", [*(REQUESTS[name] for name in ALONE), SPLIT], ids=[*ALONE, "split"])
def test_a_node_alone_gives_the_same_bits(op, dtype, requests, num_splits):
    case = make_case(Heads(4, 2, 32, 16), requests, dtype)
    together = run(op, case, num_splits)
    for request, first, end in case.requests():
        for node in range(first, end):
            alone = run(op, case.select(request, node), num_splits)
            for of_all, of_one in zip(together, alone, strict=True):
                assert torch.equal(of_all[case.rows(node)], of_one)


BREAKABLE = [
    [(3, [(0, 33)])],
    [(5, [(0, 33)]), (4, [(0, 33)], True), (70, [(0, 20)], True)],
    [(9, [(0, 30), (34, 60)]), (4, [(0, 60)]), (4, [(2, 31)])],
]
"""Nodes in one tile, one of them causal, one in two tiles; contexts that differ."""


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(("dtype", "num_splits"), [(torch.float32, 1), (torch.float16, 1), (torch.bfloat16, 4)])
def test_what_breaks_a_row_reaches_who_sees_it_alone(op, dtype, num_splits, bad):
    case = make_case(Heads(4, 2, 40, 16), BREAKABLE, dtype)
    whole = run(op, case, num_splits)
    for name in ("key", "value") if bad != bad else ("value",):  # an infinite key may be a weight of 0
        for node, number in ((0, 1), (2, 2), (2, 0), (3, 66), (4, 8)):
            row = case.rows(node).start + number
            broken = getattr(case, name).clone()
            broken[row, 1, 7] = bad
            first = row if case.is_causal[node] else case.rows(node).start
            sees = [seen for seen in range(case.rows(node).stop) if seen >= first]
            assert_only_broken(whole, run(op, replace(case, **{name: broken}), num_splits), sees)


@pytest.mark.parametrize(("dtype", "num_splits"), [(torch.float32, 1), (torch.bfloat16, 4)])
def test_what_breaks_a_stored_position_reaches_who_sees_it_alone(op, dtype, num_splits):
    case = make_case(Heads(4, 2, 40, 16), BREAKABLE, dtype)
    whole = run(op, case, num_splits)
    for position, half in itertools.product((0, 1, 30, 33, 59), (0, 1)):
        cache = case.kv_cache.clone()
        cache[case.page_table[2, position // 16], 1, position % 16, 40 * half + 7] = float("nan")
        sees = [row for node in (4, 5, 6) if position in case.visible(node) for row in whole_range(case.rows(node))]
        assert_only_broken(whole, run(op, replace(case, kv_cache=cache), num_splits), sees)


def whole_range(rows: slice) -> range:
    return range(rows.start, rows.stop)


def assert_only_broken(whole: tuple[Tensor, Tensor], broken: tuple[Tensor, Tensor], rows: list[int]) -> None:
    """Assert that of the second K/V head the given rows are not finite, and that no other bit changed."""
    out, lse = broken
    assert not bool(out[rows, 2:].isfinite().all(-1).any())
    kept = torch.ones(out.shape[:2], dtype=torch.bool)
    kept[rows, 2:] = False
    assert torch.equal(out[kept], whole[0][kept])
    assert torch.equal(lse[kept], whole[1][kept])


@pytest.mark.parametrize(("requests", "num_splits"), [(REQUESTS["odd"], 1), (SPLIT, 4)], ids=["one-pass", "split"])
def test_padding_of_captured_graphs(op, requests, num_splits):
    """Empty requests and nodes behind the last one, contexts that mean nothing, rows that are nobody's."""
    case = make_case(Heads(2, 1, 32, 32), requests, torch.bfloat16)
    num_rows = len(case.query)
    padded = replace(
        case,
        query=torch.cat([case.query, torch.full((40, 2, 32), float("nan"), dtype=torch.bfloat16)]),
        key=torch.cat([case.key, torch.full((40, 1, 32), float("nan"), dtype=torch.bfloat16)]),
        value=torch.cat([case.value, torch.full((40, 1, 32), float("nan"), dtype=torch.bfloat16)]),
        page_table=torch.cat([case.page_table, torch.full((35, case.page_table.shape[1]), 2**31 - 1).int()]),
        first_node=torch.cat([case.first_node, case.first_node[-1:].expand(35)]),
        first_row=torch.cat([case.first_row, case.first_row[-1:].expand(9)]),
        context=torch.cat([case.context, torch.tensor([[5, 2**31 - 1, -7, 3]]).int().expand(9, 4)]),
        is_causal=torch.cat([case.is_causal, torch.ones(9).int()]),
    )
    out, lse = run(op, case, num_splits)
    padded_out, padded_lse = poisoned_results(padded)
    tiles = torch.nn.functional.pad(tiles_of(padded), (0, 0, 0, 3))
    op(*(getattr(padded, name) for name in case.__slots__), padded_out, padded_lse, tiles, num_splits)
    assert torch.equal(padded_out[:num_rows], out)
    assert torch.equal(padded_lse[:num_rows], lse)
    assert torch.equal(padded_out[num_rows:], torch.zeros(40, 2, 32, dtype=torch.bfloat16))
    assert bool((padded_lse[num_rows:] == float("-inf")).all())


def test_the_grid_reaches_the_last_row(op):
    """Two rows in two tiles, of the request and of nobody: the most tiles that two rows can need."""
    case = make_case(Heads(1, 1, 32, 16), [[(1, []), (1, [])]], torch.bfloat16)
    fewer = {name: getattr(case, name)[:1] for name in ("context", "is_causal")}
    case = replace(case, first_row=case.first_row[:2], first_node=torch.tensor([0, 1]).int(), **fewer)
    out, lse = run(op, case)
    assert torch.equal(out[:1], case.value[:1])
    assert torch.equal(out[1:], torch.zeros(1, 1, 32, dtype=torch.bfloat16))
    assert lse[1] == float("-inf")


def test_results_into_strided_memory_and_without_log_sum_exp(op):
    case = make_case(Heads(3, 1, 40, 16), REQUESTS["odd"], torch.bfloat16)
    wide = torch.full((len(case.query), 5, 48), float("nan"), dtype=torch.bfloat16)
    op(*(getattr(case, name) for name in case.__slots__), wide[:, 1:4, :40], None, tiles_of(case))
    out, _ = run(op, case)
    assert torch.equal(wide[:, 1:4, :40], out)
    assert bool(wide[:, [0, 4]].isnan().all())
    assert bool(wide[..., 40:].isnan().all())


def test_scores_that_overflow_exp(op):
    case = make_case(Heads(1, 1, 32, 16), REQUESTS["canvases"], torch.float32)
    case = replace(case, scale=300.0)
    out, _ = run(op, case)
    exact, _ = expected(case, torch.float64)
    in_float32, _ = expected(case, torch.float32)
    floor = torch.finfo(torch.float32).eps * exact.abs().amax()
    assert (out - exact).abs().amax() <= 2 * (in_float32 - exact).abs().amax() + floor


@pytest.mark.slow("kernels")
def test_misaligned_tensors_are_refused():
    case = make_case(Heads(1, 1, 32, 16), REQUESTS["odd"], torch.bfloat16)
    odd = torch.zeros(len(case.query), 1, 33, dtype=torch.bfloat16)[..., :32]
    with pytest.raises(
        RuntimeError, match=r"draft_graph_attention: query has strides \[33, 33, 1\], on CUDA all but the last"
    ):
        run(simt.ops().draft_graph_attention, replace(case, query=odd))


WRONG_TILES: dict[str, tuple[dict[tuple[int, int], int], str]] = {
    "request": ({(1, 0): 5}, "tiles[1] is query 64 of request 5 with rows"),
    "query": ({(1, 1): 0}, "tiles[1] is query 0 of request 0 with rows [0, 40) and nodes"),
    "rows": ({(1, 3): 41}, "which does not follow query 64 in the layout"),
    "nodes": ({(0, 5): 1}, "tiles[0] is query 0 of request 0 with rows [0, 40) and nodes [0, 1)"),
    "no-rows": ({(1, 3): 0, (1, 2): 0}, "tiles[2] is query 0 of request 1"),
    "end": ({(2, 3): 0, (2, 2): 0}, "tiles end with query 80, the rows have 90"),
}


@pytest.mark.slow("kernels")
@pytest.mark.parametrize("name", WRONG_TILES)
def test_wrong_tiles_are_refused(name):
    changes, message = WRONG_TILES[name]
    case = make_case(Heads(2, 1, 32, 16), [[(20, []), (20, [])], [(5, [(0, 3)])]], torch.bfloat16)
    tiles = tiles_of(case)
    for place, value in changes.items():
        tiles[place] = value
    out, lse = poisoned_results(case)
    fields = [getattr(case, field) for field in case.__slots__]
    with pytest.raises(RuntimeError, match=re.escape(message)):
        simt.ops().draft_graph_attention(*fields, out, lse, tiles)


@pytest.mark.slow("kernels")
@pytest.mark.parametrize(
    ("last", "message"),
    [
        ([None], "tiles are missing, on CUDA they say which CTA takes which queries"),
        ([torch.zeros(3, 6).int()], "tiles must be [3, 8], got [3, 6]"),
        ([torch.zeros(0, 8).int()], "tiles has none, and query has 46 rows, which no CTA would take"),
        ([torch.zeros(3, 8).int(), 33], "num_splits is 33, allowed are 1 to 32"),
    ],
)
def test_calls_without_tiles_are_refused(last, message):
    case = make_case(Heads(2, 1, 32, 16), REQUESTS["odd"], torch.bfloat16)
    fields = [getattr(case, field) for field in case.__slots__]
    with pytest.raises(RuntimeError, match=re.escape(f"draft_graph_attention: {message}")):
        simt.ops().draft_graph_attention(*fields, *poisoned_results(case), *last)
