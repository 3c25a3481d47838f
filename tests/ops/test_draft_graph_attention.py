"""`draft_graph_attention` against plain torch, and what must never matter."""

import itertools
import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.ops.attention_cases import Case, Heads, Nodes, assert_close, make_case, poisoned_results, run
from vllm_dllm.ops import draft_graph_attention

CONTEXTS: list[list[tuple[int, int]]] = [
    [(0, 0)],
    [(0, 1)],
    [(0, 7)],
    [(0, 33)],
    [(0, 113)],
    [(0, 1000)],
    [(0, 100), (132, 200)],
    [(3, 40), (50, 61)],
    [(64, 128), (128, 129)],
]
"""Lengths of one row to many tiles, a hole between tiles, a hole inside a tile, neighbours."""

SMALL = Heads(num_heads=4, num_kv_heads=1, head_dim=64, page_size=24)

NUMERIC: dict[str, tuple[Heads, list[Nodes]]] = {
    "contexts": (SMALL, [[(5, context)] for context in CONTEXTS]),
    "13-nodes": (Heads(2, 2, 40, 16), [[(4, [(0, 33), (37, 50)])] * 13, [(8, [(0, 113)])] * 7]),
    "commit-node": (SMALL, [[(8, [(0, 40)]), *[(8, [(0, 40), (48, 75)])] * 3, (1, [(0, 7)])]]),
    "gqa-8": (Heads(8, 1, 128, 128), [[(32, [(0, 113)])] * 3, [(7, [(0, 1000)])]]),
    "mha": (Heads(3, 3, 32, 256), [[(8, [(0, 1000)])], [(32, [(0, 33)])] * 2]),
    "head-dim-256": (Heads(2, 1, 256, 24), [[(7, [(0, 113)])] * 2, [(1, [(1, 2)])]]),
    "empty": (SMALL, [[], [(0, [(0, 7)])], [(3, [(0, 7)]), (0, [(5, 99)]), (3, [(0, 7)])], []]),
    "refresh": (SMALL, [[(200, [(0, 0)])], [(113, [(0, 33)])]]),
    "causal": (SMALL, [[(200, [(0, 0)], True)], [(9, [(0, 33)]), (70, [(0, 33)], True), (1, [(0, 5)], True)]]),
}
"""(shape of the layer, nodes of each request)."""

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def numeric_case(name: str, dtype: torch.dtype, layout: str = "HND") -> Case:
    heads, requests = NUMERIC[name]
    return make_case(heads, requests, dtype, layout=layout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NUMERIC)
def test_equals_torch(name, dtype):
    case = numeric_case(name, dtype)
    assert_close(case, *run(draft_graph_attention, case.with_garbage()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_torch_with_odd_strides(dtype):
    case = numeric_case("commit-node", dtype, layout="NHD")
    assert not case.query.is_contiguous()
    assert_close(case, *run(draft_graph_attention, case.with_garbage()))


def test_written_where_strides_say():
    case = numeric_case("commit-node", torch.float32)
    out, lse = run(draft_graph_attention, case)
    num_rows, num_heads, head_dim = out.shape
    wide = out.new_full((num_rows, num_heads + 1, head_dim + 8), float("nan"))
    draft_graph_attention(*tensors(case), wide[:, 1:, :-8], None)
    assert torch.equal(wide[:, 1:, :-8], out)
    assert bool(wide[:, 0].isnan().all())
    assert bool(wide[..., -8:].isnan().all())
    assert bool(lse.isfinite().all())


def test_rows_of_no_node_give_nothing():
    case = numeric_case("13-nodes", torch.bfloat16)
    fewer = replace(case, first_node=torch.tensor([0, 13, 15], dtype=torch.int32))
    out, lse = run(draft_graph_attention, fewer)
    end = int(case.first_row[15])
    assert end < len(out)
    assert bool((out[end:] == 0).all())
    assert bool((lse[end:] == float("-inf")).all())
    assert torch.equal(out[:end], run(draft_graph_attention, case)[0][:end])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["contexts", "13-nodes", "commit-node", "gqa-8", "causal"])
def test_node_alone_equals_node_in_the_batch(name, dtype):
    case = numeric_case(name, dtype)
    out, lse = run(draft_graph_attention, case)
    for request, first, end in case.requests():
        for node in range(first, end):
            alone_out, alone_lse = run(draft_graph_attention, case.select(request, node))
            assert torch.equal(alone_out, out[case.rows(node)])
            assert torch.equal(alone_lse, lse[case.rows(node)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_later_rows_of_a_causal_node_change_no_bit(dtype):
    case = make_case(SMALL, [[(150, [(0, 33)], True)]], dtype)
    out, lse = run(draft_graph_attention, case)
    for num_rows in (1, 2, 63, 64, 65, 130):
        parts = {name: getattr(case, name)[:num_rows] for name in ("query", "key", "value")}
        first = replace(case, **parts, first_row=int32(0, num_rows))
        first_out, first_lse = run(draft_graph_attention, first)
        assert torch.equal(first_out, out[:num_rows])
        assert torch.equal(first_lse, lse[:num_rows])


@pytest.mark.parametrize("is_causal", [False, True])
def test_chunks_and_threads_do_not_matter(is_causal):
    """Few lanes per item with many threads, a request's heads and rows over several chunks with one."""
    requests = [[(250, [(0, 33)], is_causal)], [(7, [(0, 113)])] * 3]
    case = make_case(Heads(8, 1, 32, 16), requests, torch.float32)
    assert 250 * 8 > 1536
    before = torch.get_num_threads()
    results = []
    for num_threads in (1, 2, 5):
        torch.set_num_threads(num_threads)
        results.append(run(draft_graph_attention, case))
    torch.set_num_threads(before)
    assert_close(case, *results[0])
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_breaks_one_node_reaches_no_other(dtype, bad):
    """Nodes of 4 lanes share vectors; the broken one is told apart by its NaN results."""
    case = make_case(Heads(2, 2, 40, 16), [[(3, [(0, 33)])] * 5], dtype)
    out, lse = run(draft_graph_attention, case)
    rows = case.rows(2)
    for name in ("query", "key", "value"):
        broken = getattr(case, name).clone()
        broken[rows.start, 1, 7] = bad
        broken_out, broken_lse = run(draft_graph_attention, replace(case, **{name: broken}))
        others = [row for row in range(len(out)) if row not in range(rows.start, rows.stop)]
        assert torch.equal(broken_out[others], out[others])
        assert torch.equal(broken_lse[others], lse[others])
        assert torch.equal(broken_out[:, 0], out[:, 0])
        assert not bool(broken_out[rows.start, 1].isfinite().all())


def test_scores_beyond_the_range_of_exp():
    case = numeric_case("contexts", torch.float32)
    large = replace(case, query=1000 * case.query)
    assert_close(large, *run(draft_graph_attention, large))


def test_visible_as_written():
    """With values that are one-hot in position or row, `out` is positive exactly where a row sees."""
    num_positions, num_rows, head_dim = 6, 3, 32
    intervals = [(begin, end) for begin in range(4) for end in range(5)]
    contexts = [(*a, *b) for a, b in itertools.product(intervals, intervals) if a[1] <= b[0]]
    splits = [(0, 3, 3), (0, 1, 3), (0, 0, 3)]
    for context, other in zip(contexts, reversed(contexts), strict=True):
        for split, is_causal in itertools.product(splits, [False, True]):
            case = one_hot_case(num_positions, num_rows, head_dim, split, (context, other), is_causal=is_causal)
            out, _ = run(draft_graph_attention, case)
            for row in range(num_rows):
                node = 0 if row < split[1] else 1
                begin0, end0, begin1, end1 = (context, other)[node]
                seen = {*range(begin0, end0), *range(begin1, end1)}
                end = row + 1 if is_causal and node == 1 else split[node + 1]
                seen |= {num_positions + own for own in range(split[node], end)}
                assert set(out[row, 0].nonzero().flatten().tolist()) == seen


def one_hot_case(
    num_positions: int, num_rows: int, head_dim: int, split: tuple[int, ...], contexts: tuple, *, is_causal: bool
) -> Case:
    one_hot = torch.eye(head_dim)
    cache = torch.zeros(1, 1, 16, 2 * head_dim)
    cache[0, 0, :num_positions, head_dim:] = one_hot[:num_positions]
    return Case(
        query=torch.zeros(num_rows, 1, head_dim),
        key=torch.zeros(num_rows, 1, head_dim),
        value=one_hot[num_positions : num_positions + num_rows, None],
        kv_cache=cache,
        page_table=torch.zeros(1, 1, dtype=torch.int32),
        first_node=torch.tensor([0, 2], dtype=torch.int32),
        first_row=torch.tensor(split, dtype=torch.int32),
        context=torch.tensor(contexts, dtype=torch.int32),
        is_causal=torch.tensor([False, is_causal], dtype=torch.int32),
        scale=1.0,
    )


def tensors(case: Case) -> list[Tensor]:
    return [getattr(case, name) for name in case.__slots__]


@pytest.mark.usefixtures("collected")
@pytest.mark.parametrize("with_lse", [True, False])
def test_opcheck(with_lse):
    case = numeric_case("13-nodes", torch.bfloat16)
    out, lse = (torch.zeros_like(result) for result in run(draft_graph_attention, case))
    op = torch.ops.vllm_dllm.draft_graph_attention.default
    torch.library.opcheck(op, (*tensors(case), out, lse if with_lse else None))


@pytest.mark.usefixtures("collected")
def test_can_be_traced():
    case = numeric_case("commit-node", torch.float32)

    def twice(query: Tensor) -> Tensor:
        out = torch.empty_like(query)
        draft_graph_attention(query, *tensors(case)[1:], out)
        return 2 * out

    traced = torch.compile(twice, fullgraph=True, backend="eager")
    assert torch.equal(traced(case.query), twice(case.query))


def int32(*numbers: object) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


HALF = torch.zeros(6, 2, 64, dtype=torch.float16)
CACHE = torch.zeros(5, 1, 16, 128)
BAD: dict[str, tuple[dict[str, object], str]] = {
    "dims": ({"query": torch.zeros(3, 4)}, "query must be [num_rows, num_heads, head_dim], got [3, 4]; reshape it"),
    "cache-dims": (
        {"kv_cache": torch.zeros(3, 4)},
        "kv_cache must be [num_pages, num_kv_heads, page_size, 2 * head_dim]",
    ),
    "dtype": ({"query": HALF.double()}, "query must be float32, float16 or bfloat16, got Double; convert"),
    "dtypes": ({"value": HALF[:, :1]}, "value must be Float, got Half; convert it with .to()"),
    "head-dim": ({"query": torch.zeros(6, 2, 36)}, "head_dim is 36, allowed are multiples of 8 from 32 to 256"),
    "heads": ({"key": torch.zeros(6, 4, 64)}, "query has 2 heads and key 4, which must divide them; give"),
    "page-size": ({"kv_cache": CACHE[:, :, :8]}, "page_size is 8, allowed are 16 to 256; set vLLM's block_size"),
    "scale": ({"scale": 0.0}, "scale is 0, it must be positive and finite; give 1 / sqrt(head_dim)"),
    "scale-nan": ({"scale": float("nan")}, "scale is nan, it must be positive and finite"),
    "key-rows": ({"key": torch.zeros(5, 1, 64)}, "key must be [6, 1, 64], got [5, 1, 64]"),
    "out": ({"out": torch.zeros(6, 2, 32)}, "out must be [6, 2, 64], got [6, 2, 32]"),
    "strides": (
        {"query": torch.zeros(6, 64, 2).mT},
        "query must be contiguous in its last dimension, got strides [128, 1, 2]; call .contiguous()",
    ),
    "index-dtype": ({"first_row": torch.tensor([0, 2, 6])}, "first_row must be Int, got Long; convert it with .to()"),
    "first-node-size": ({"first_node": int32(0, 2, 2)}, "first_node must be [2], got [3]"),
    "context-size": (
        {"context": int32([0, 9], [0, 9])},
        "context must be [2, 4], got [2, 2]",
    ),
    "context-strides": (
        {"context": torch.zeros(2, 8, dtype=torch.int32)[:, :4]},
        "context must be contiguous, got strides [8, 1]; call .contiguous()",
    ),
    "is-causal-size": ({"is_causal": int32(0)}, "is_causal must be [2], got [1]"),
    "is-causal": (
        {"is_causal": int32(0, 2)},
        "is_causal[1] is 2, allowed are 0 and 1; give 1 where a row sees no later",
    ),
    "lse": ({"lse": torch.zeros(2, 6)}, "lse must be [6, 2], got [2, 6]"),
    "first-node-begin": ({"first_node": int32(1, 2)}, "first_node must begin with 0, got 1; give running sums"),
    "first-node-end": ({"first_node": int32(0, 3)}, "first_node must ascend to at most 2, got 3 after 0; give"),
    "first-row-descends": ({"first_row": int32(0, 4, 3)}, "first_row must ascend to at most 6, got 3 after 4; give"),
    "interval-end": (
        {"context": int32([0, 9, 0, 0], [0, 9, 20, 49])},
        "context of node 1 has the interval [20, 49), allowed are positions 9 to 48; give disjoint intervals",
    ),
    "interval-begin": ({"context": int32([-1, 9, 0, 0], [0, 9, 0, 0])}, "context of node 0 has the interval [-1, 9)"),
    "intervals": ({"context": int32([0, 9, 8, 10], [0, 9, 0, 0])}, "context of node 0 has the interval [8, 10)"),
    "page": (
        {"page_table": int32([0, 5, 1])},
        "page_table[0][1] is 5, the cache has pages 0 to 4 and node 1 sees that page; give its page, or less context",
    ),
    "negative-page": ({"page_table": int32([-1, 0, 1])}, "page_table[0][0] is -1, the cache has pages 0 to 4"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_calls_say_what_is_wrong(name):
    changed, message = BAD[name]
    case = make_case(Heads(2, 1, 64, 16), [[(2, [(0, 9)]), (4, [(0, 9), (20, 24)])]], torch.float32)
    out, lse = poisoned_results(case)
    arguments = {field: getattr(case, field) for field in case.__slots__} | {"out": out, "lse": lse}
    arguments |= {"kv_cache": CACHE, "page_table": int32([0, 1, 2])} | changed
    with pytest.raises(RuntimeError, match=re.escape(f"draft_graph_attention: {message}")):
        torch.ops.vllm_dllm.draft_graph_attention(*arguments.values())
