"""The CUDA kernel of draft_graph_attention, on the emulator and, where there is one, on a GPU."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from tests.ops import simt
from tests.ops.attention_cases import Case, Heads, assert_close, expected, make_case, run
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
"""More than a split's 1024 positions, some splits empty, and a node with too many rows to be split."""

Op = Callable[..., None]


@pytest.fixture(params=["simt", pytest.param("cuda", marks=pytest.mark.gpu)])
def op(request: pytest.FixtureRequest) -> Op:
    if request.param == "simt":
        native: Op = simt.ops().draft_graph_attention
        return native

    def on_gpu(*arguments: object) -> None:
        moved = [argument.cuda() if isinstance(argument, torch.Tensor) else argument for argument in arguments]
        draft_graph_attention(*moved)
        for result, given in zip(moved[-2:], arguments[-2:], strict=True):
            if isinstance(given, torch.Tensor):
                given.copy_(result)

    return on_gpu


def check(op: Op, case: Case) -> None:
    out, lse = run(op, case.with_garbage())
    assert_close(case, out, lse)


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_torch_with_a_split_context(op, dtype):
    check(op, make_case(Heads(2, 1, 40, 32), SPLIT, dtype))


def test_equals_torch_with_more_rows_than_the_workspace_has(op):
    check(op, make_case(Heads(1, 1, 32, 32), [[(200, [(0, 1100)]), (5, [(3, 1090)])]], torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("requests", [*(REQUESTS[name] for name in ALONE), SPLIT], ids=[*ALONE, "split"])
def test_a_node_alone_gives_the_same_bits(op, dtype, requests):
    case = make_case(Heads(4, 2, 32, 16), requests, dtype)
    together = run(op, case)
    for request, first, end in case.requests():
        for node in range(first, end):
            alone = run(op, case.select(request, node))
            for of_all, of_one in zip(together, alone, strict=True):
                assert torch.equal(of_all[case.rows(node)], of_one)


@pytest.mark.parametrize("requests", [REQUESTS["odd"], SPLIT], ids=["one-pass", "split"])
def test_padding_of_captured_graphs(op, requests):
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
    out, lse = run(op, case)
    padded_out, padded_lse = run(op, padded)
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
    op(*(getattr(case, name) for name in case.__slots__), wide[:, 1:4, :40], None)
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


def test_misaligned_tensors_are_refused():
    case = make_case(Heads(1, 1, 32, 16), REQUESTS["odd"], torch.bfloat16)
    odd = torch.zeros(len(case.query), 1, 33, dtype=torch.bfloat16)[..., :32]
    with pytest.raises(
        RuntimeError, match=r"draft_graph_attention: query has strides \[33, 33, 1\], on CUDA all but the last"
    ):
        run(simt.ops().draft_graph_attention, replace(case, query=odd))
