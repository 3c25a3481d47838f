"""`decide_walk` equals `unmask.walk.walk`, on each device; the walk itself, on canvases made by hand."""

import re
from dataclasses import fields, replace
from operator import itemgetter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops import simt
from tests.ops.walks import MASK, PLAIN, Call, columns, random_call, random_params, random_stats, to
from tests.suite.parts import some_of
from vllm_dllm import ops
from vllm_dllm.ops.vocab_stats import PartialStats
from vllm_dllm.unmask.policy import POLICY_IDS
from vllm_dllm.unmask.schedule import UnmaskRules
from vllm_dllm.unmask.walk import Nodes, Trajectory, native_walk, walk

SIZES = [(1, 1, 4), (1, 2, 1), (3, 5, 7), (20, 11, 32), (33, 33, 8), (2, 40, 113)]
"""(num_reqs, num_nodes, block_length)"""


RULES = (PLAIN, UnmaskRules(unmasks_first_alone=True), UnmaskRules(unmasks_first_alone=True, sub_block_length=3))


def check_equal(call: Call, where: str, rules: UnmaskRules = PLAIN) -> Trajectory:
    """Compare with the torch twin."""
    *parts, state = call
    expected = walk(*parts, MASK, rules, state)
    if where != "simt":
        parts, state = [to(where, part) for part in parts], {name: field.to(where) for name, field in state.items()}
    found = native_walk(*parts, MASK, rules, state)
    wanted = columns(expected)
    for name, column in columns(found).items():
        if column.is_floating_point():
            torch.testing.assert_close(column.cpu(), wanted[name], rtol=1e-12, atol=1e-12)
        else:
            assert torch.equal(column.cpu(), wanted[name]), name
    return expected


@pytest.fixture(params=["cpu", simt.WHERE, pytest.param("cuda", marks=pytest.mark.gpu)])
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "simt":
        monkeypatch.setattr(ops, "decide_walk", lambda *args: simt.ops().decide_walk(*args))
    return str(request.param)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_the_torch_twin(size, where):
    longest = 0
    for seed in range(4 if where == "simt" else 12):
        rules = RULES[seed % 3]
        done = check_equal(random_call(*size, seed, is_sampled=seed % 2 == 1, rules=rules), where, rules)
        longest = max(longest, int(done.num_steps.max()))
    assert longest >= min(size[1], size[2], 3)


@pytest.mark.parametrize("size", [(20, 5, 6), (33, 9, 4)], ids=str)
def test_look_aheads_that_come_true(size, where):
    done = [check_equal(random_call(*size, seed, looks_ahead=True), where) for seed in range(4)]
    came_over = torch.cat([each.came_over for each in done])
    assert came_over.any()
    assert not came_over.all()


@settings(max_examples=some_of(150), deadline=None)
@given(
    size=st.tuples(st.integers(1, 12), st.integers(1, 9), st.integers(1, 20)),
    seed=st.integers(0, 2**31),
    is_sampled=st.booleans(),
    rules=st.builds(UnmaskRules, unmasks_first_alone=st.booleans(), sub_block_length=st.none() | st.integers(1, 21)),
)
def test_equals_the_torch_twin_on_any_call(size, seed, is_sampled, rules):
    check_equal(random_call(*size, seed, is_sampled=is_sampled, rules=rules), "cpu", rules)


def test_a_step_stays_in_the_leftmost_stage_that_has_masks(where):
    """Of a block in parts of three whose first position comes alone: nothing right of the stage, and each position."""
    rules = UnmaskRules(unmasks_first_alone=True, sub_block_length=3)
    canvas = torch.tensor([[9] * 8, [1] + [9] * 7, [1, 2, 3, 4, 9, 9, 9, 9], [1, 2, 3, 4, 5, 6, 9, 9]])
    canvas = canvas.masked_fill(canvas == 9, MASK)[:, None].contiguous()
    generator = torch.Generator().manual_seed(0)
    stats, _ = random_stats(32, generator, is_sampled=False)
    every = {"threshold": 1e-9, "temperature": 0.0, "alg_temp": 0.0, "policy_id": POLICY_IDS["threshold"]}
    params = random_params(4, 8, generator)
    params = replace(params, **{name: torch.full_like(getattr(params, name), value) for name, value in every.items()})
    one = torch.ones(4, 1, dtype=torch.int64)
    nodes = Nodes(canvas, canvas == MASK, one.bool(), one - 1)
    parts = [to(where, part) if where != "simt" else part for part in (nodes, stats, params)]
    found = native_walk(*parts, MASK, rules).canvas.cpu() != MASK
    assert found.sum(1).tolist() == [1, 3, 6, 8]
    assert not (~found[:, :-1] & found[:, 1:]).any(), "the stages are not from left to right"


def chain(canvas: list[str], tokens: list[str], is_valid: list[bool] | None = None) -> Trajectory:
    """Walk with `sequential`, a position a step; a letter is a token, "." a mask; `tokens` are what each node draws."""
    length = len(canvas[0])
    ids = torch.tensor([[MASK if letter == "." else ord(letter) for letter in text] for text in canvas])[None]
    drawn = torch.tensor([MASK if letter == "." else ord(letter) for text in tokens for letter in text])
    generator = torch.Generator().manual_seed(0)
    stats = replace(random_stats(len(drawn), generator, is_sampled=False)[0], token_ids=drawn)
    params = replace(random_params(1, length, generator), policy_id=torch.tensor([POLICY_IDS["sequential"]]))
    params = replace(params, counts=torch.ones(length, 1, dtype=torch.int64), prompt_len=params.start)
    valid = torch.tensor([is_valid or [True] * len(canvas)])
    nodes = Nodes(ids, ids == MASK, valid, valid.long())
    done = native_walk(nodes, stats, params, MASK, UnmaskRules())
    for name, column in columns(walk(nodes, stats, params, MASK, UnmaskRules())).items():
        torch.testing.assert_close(columns(done)[name], column, rtol=1e-12, atol=1e-12)
    return done


def test_nothing_comes_true():
    done = chain(["...", "x.."], ["abc", "xbc"])
    assert (done.path.tolist(), done.num_accepted.tolist()) == ([[0, -1]], [0])
    assert done.canvas.tolist() == [[ord("a"), MASK, MASK]]


def test_a_chain_is_followed_in_any_order_of_nodes():
    done = chain(["...", "ab.", "a.."], ["abc", "abc", "abc"])
    assert (done.path.tolist(), done.step.tolist(), done.node.tolist()) == ([[0, 2, 1]], [[0, 1, 2]], [1])
    assert (done.num_unmasked.tolist(), done.is_finished.tolist()) == ([3], [True])


def test_what_a_node_says_decides_its_own_step_alone():
    """The second node draws other tokens than the root, for the position that it decides."""
    done = chain(["...", "a.."], ["abc", "xyz"])
    assert done.canvas.tolist() == [[ord("a"), ord("y"), MASK]]


def test_invalid_nodes_are_not_accepted():
    done = chain(["...", "a..", "ab."], ["abc", "abc", "abc"], [True, False, True])
    assert done.path.tolist() == [[0, -1, -1]]


def test_equal_drafts_count_once():
    done = chain(["...", "a..", "a..", "ab."], ["abc", "abc", "xyz", "abc"])
    assert done.path.tolist() == [[0, 1, 3, -1]]


def test_finished_drafts_are_not_decided():
    done = chain(["ab.", "abc"], ["xyc", "xyz"])
    assert (done.path.tolist(), done.is_finished.tolist()) == ([[0, -1]], [True])


def test_a_circle_ends():
    """A token that is the mask, which no row draws, leaves the canvas as it is."""
    done = chain(["ab.", "ab."], ["xy.", "xy."])
    assert (done.path.tolist(), done.num_accepted.tolist()) == ([[0, 1]], [1])


def test_a_finished_root_is_not_decided():
    done = chain(["abc", "abc"], ["xyz", "xyz"])
    assert (done.path.tolist(), done.num_steps.tolist(), done.num_accepted.tolist()) == ([[-1, -1]], [0], [0])
    assert done.canvas.tolist() == [[ord("a"), ord("b"), ord("c")]]


def test_the_prompts_end_is_no_step():
    done = chain(["ab..", "abc."], ["xycd", "xycd"])
    assert done.step.tolist() == [[-1, -1, 0, 1]]


def native_args(call: Call) -> list[Any]:
    nodes, stats, params, state = call
    rows = [stats.token_ids, stats.token_logits, stats.top_ids, stats.top_logits, stats.rest, stats.weighted]
    memory = [*state.values(), stats.given_logits]
    return [nodes.canvas, nodes.is_valid, nodes.end, nodes.evaluated, rows, params.tensors, memory, MASK, False, 0]


def test_no_requests():
    nodes, stats, params, _ = random_call(3, 2, 4, 0)
    nodes = replace(nodes, **{f.name: v[:0] for f in fields(nodes) if (v := getattr(nodes, f.name)) is not None})
    params = replace(params, **{n: v[..., :0] for n in params.__slots__ if isinstance(v := getattr(params, n), Tensor)})
    done = native_walk(nodes, PartialStats.of(lambda column: column[:0], stats), params, MASK, UnmaskRules())
    assert done.canvas.shape == (0, 4)
    assert done.path.shape == (0, 2)


@pytest.mark.usefixtures("collected")
@pytest.mark.parametrize("looks_ahead", [False, True])
def test_opcheck(looks_ahead):
    args = native_args(random_call(3, 5, 7, 0, looks_ahead=looks_ahead))
    ops.decide_walk(*args)
    torch.library.opcheck(torch.ops.vllm_dllm.decide_walk.default, args)


@pytest.mark.usefixtures("collected")
def test_can_be_traced():
    args = native_args(random_call(7, 11, 4, 0))

    def total(canvas: Tensor) -> Tensor:
        done = ops.decide_walk(canvas, *args[1:])
        return done[0] + done[3]

    assert torch.equal(torch.compile(total, fullgraph=True, backend="eager")(args[0]), total(args[0]))


def with_row(index: int, row: Any) -> Any:
    return lambda args: args[4].__setitem__(index, row(args[4][index]))


def with_param(index: int, param: Any) -> Any:
    return lambda args: args[5].__setitem__(index, param(args[5][index]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda args: args.__setitem__(0, args[0][0]),
            "canvas must be [num_reqs, num_nodes, block_length] with the root, got [3, 4]; ",
        ),
        (lambda args: args.__setitem__(0, args[0].int()), "canvas must be Long, got Int; convert it with .to()"),
        (
            lambda args: args.__setitem__(0, args[0].mT.contiguous().mT),
            "canvas must be contiguous, got strides [12, 1, 3]; call ",
        ),
        (
            lambda args: args.__setitem__(1, args[1][:1]),
            "is_valid must be [2, 3], got [1, 3]; sizes follow from canvas",
        ),
        (
            lambda args: args.__setitem__(2, args[0][:, 0, :2]),
            "end must be [2, 4], got [2, 2]; sizes follow from canvas",
        ),
        (lambda args: args[4].pop(), "rows must be 6 or 8 tensors, got 5; give token_ids, "),
        (
            with_row(2, lambda row: row[:, :1]),
            "rows.top_ids must be [num_rows, num_candidates] with num_candidates in 2..8, got [24, 1]; ",
        ),
        (with_row(1, lambda row: row.double()), "rows.token_logits must be Float, got Double; convert it with .to()"),
        (with_row(5, lambda row: row[:9]), "rows.weighted must be [24], got [9]; sizes follow from canvas"),
        (lambda args: args[5].pop(), "params must be 14 tensors, got 13; give policy_id, "),
        (lambda args: args[6].pop(), "memory must be 0 or 3 tensors, got 2; give credit_ids, credits and "),
        (
            lambda args: args[6].__setitem__(1, args[6][1][..., :7].contiguous()),
            "memory.credits must be [2, 4, 8], got [2, 4, 7]; sizes follow from canvas",
        ),
        (
            lambda args: args[6].__setitem__(2, args[6][2][:9]),
            "memory.given_logits must be [24, 8], got [9, 8]; sizes follow from canvas",
        ),
        (
            lambda args: args.__setitem__(3, args[1].long()[:, :2].contiguous()),
            "evaluated must be [2, 3], got [2, 2]; sizes follow from canvas",
        ),
        (
            with_param(0, lambda param: param.double()),
            "params.policy_id must be Long, got Double; convert it with .to()",
        ),
        (
            with_param(12, lambda param: param.T.contiguous()),
            "params.counts must be [4, 2], got [2, 4]; sizes follow from canvas",
        ),
    ],
)
def test_bad_calls_say_what_is_wrong(change, message):
    args = native_args(random_call(2, 3, 4, 0))
    change(args)
    with pytest.raises(RuntimeError, match=re.escape(f"decide_walk: {message}")):
        ops.decide_walk(*args)


@pytest.mark.gpu
def test_cuda_can_be_captured_in_a_graph():
    """A capture fails unless the launch goes to the current stream and nothing synchronises."""
    *parts, state = random_call(7, 11, 4, 0)
    on_gpu = [to("cuda", part) for part in parts]
    args = native_args((*on_gpu, {name: field.cuda() for name, field in state.items()}))  # type: ignore[arg-type]
    expected = ops.decide_walk(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = ops.decide_walk(*args)
    for tensor in result:
        tensor.fill_(0)
    graph.replay()
    assert all(torch.equal(*pair) for pair in zip(result, expected, strict=True))


@pytest.mark.parametrize("looks_ahead", [False, True])
def test_requests_may_have_different_numbers_of_nodes(looks_ahead, where):
    nodes, stats, params, state = random_call(20, 5, 6, 3, looks_ahead=looks_ahead)
    is_evaluated = torch.rand(20, 5, generator=torch.Generator().manual_seed(1)) < 0.6
    is_evaluated[:, 0] = True
    place = is_evaluated.flatten().nonzero()[:, 0]
    number = torch.full((100,), -1).index_put((place,), torch.arange(len(place))).view(20, 5)
    rows = (place[:, None] * 6 + torch.arange(6)).flatten()
    some = PartialStats.of(itemgetter(rows), stats)
    all_nodes = replace(nodes, is_valid=nodes.is_valid & is_evaluated)
    expected = columns(walk(all_nodes, stats, params, MASK, UnmaskRules(), state))
    found = columns(check_equal((nodes.only(number, place), some, params, state), where))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(nodes.only(number, place).per_evaluated(nodes.canvas), nodes.canvas.flatten(0, 1)[place])
