"""`settle_step` equals `state.settle.settle`, on each device: what is emitted, reported and kept by slot."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops import simt
from tests.ops.walks import MASK, random_call, to
from tests.state.test_canvas import request as request_params
from tests.suite.parts import some_of
from vllm_dllm import ops
from vllm_dllm.draft.graph import MAX_CANDIDATES
from vllm_dllm.state.canvas import Blocks, CanvasState
from vllm_dllm.state.drafts import DraftState
from vllm_dllm.state.ends import NEVER, NO_ENDS, Ends
from vllm_dllm.state.report import MAX_DEPTH, REPORT_LEN, Column
from vllm_dllm.state.settle import Emission, Ledger, native_settle, settle
from vllm_dllm.unmask.policy import POLICY_IDS
from vllm_dllm.unmask.schedule import UnmaskRules
from vllm_dllm.unmask.stats import Candidates
from vllm_dllm.unmask.walk import Nodes, Trajectory, walk

Step = tuple[Blocks, Nodes, Trajectory, Ledger]


def random_step(
    size: tuple[int, int, int], seed: int, *, looks_ahead: bool, remembers: bool, plans: bool
) -> tuple[Step, int]:
    """Draw a step as its walk leaves it, and how many slots there are."""
    num_reqs, num_nodes, block_length = size
    generator = torch.Generator().manual_seed(seed)

    def whole(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    nodes, stats, params, state = random_call(*size, seed, looks_ahead=looks_ahead)
    nodes.depth.copy_(whole(0, MAX_DEPTH + 3, num_reqs, num_nodes))
    done = walk(nodes, stats, params, MASK, UnmaskRules(), state if remembers else {})
    ids = whole(0, 16, num_reqs, block_length, MAX_CANDIDATES)
    candidates = Candidates(ids, torch.randn(ids.shape, generator=generator, dtype=torch.float64))
    canvases = (done.canvas.contiguous(), done.next_canvas.contiguous())
    done = replace(done, canvas=canvases[0], next_canvas=canvases[1], candidates=candidates)
    num_slots = num_reqs + seed % 3
    slots = torch.randperm(num_slots, generator=generator)[:num_reqs]
    blocks = Blocks(slots, slots.numpy(), 4 * whole(0, 9, num_reqs))
    num_known = blocks.start + whole(0, block_length, num_reqs)
    planned = torch.stack([whole(0, 2, num_reqs), whole(0, 2, num_reqs), whole(0, 99, num_reqs)]) if plans else None
    ledger = Ledger(num_reqs + seed % 2, num_known, block_length + whole(0, 9, num_reqs), planned)
    return (blocks, nodes, done, ledger), num_slots


def new_stores(num_slots: int, block_length: int, where: str = "cpu") -> tuple[CanvasState, DraftState]:
    """Make stores that hold something else everywhere; answers have ends of all kinds."""
    state = CanvasState(num_slots, block_length, MASK, torch.device(where))
    for slot in range(num_slots):
        tables = {"counts": (1,) * block_length, "times": (0.0,) * block_length}
        ends = (NO_ENDS, Ends((slot % 16, (3 * slot) % 16), slot), Ends((7,), 0, 5 + slot), Ends(limit=3 * slot))
        state.add_request(slot, request_params(policy_id=POLICY_IDS["credit"], ends=ends[slot % 4], **tables))
    state.apply_staged_writes()
    state.canvas.fill_(77)
    state.memory["credit_ids"].fill_(78)
    drafts = DraftState(state)
    drafts.tensors[0].fill_(79)
    drafts.is_known[::2] = True
    return state, drafts


def kept(state: CanvasState, drafts: DraftState) -> dict[str, Tensor]:
    names = ("token_ids", "log_probs", "was_masked", "is_known")
    return {"canvas": state.canvas, **state.memory, **dict(zip(names, drafts.tensors, strict=True))}


def check_equal(
    size: tuple[int, int, int], seed: int, where: str, *, drafts: bool = True, **options: bool
) -> tuple[Emission, Trajectory]:
    """Compare with the torch twin."""
    (blocks, nodes, done, ledger), num_slots = random_step(size, seed, **options)
    expected_stores = new_stores(num_slots, size[2])
    expected = settle(expected_stores[0], expected_stores[1] if drafts else None, blocks, nodes, done, ledger)
    device = where if where == "cuda" else "cpu"
    stores = new_stores(num_slots, size[2], device)
    moved = replace(
        to(device, done),
        candidates=to(device, done.candidates),
        state={name: field.to(device) for name, field in done.state.items()},
    )
    step = (to(device, blocks), to(device, nodes), moved, to(device, ledger))
    found = native_settle(stores[0], stores[1] if drafts else None, *step)
    for name in ("sampled", "num_sampled", "num_rejected", "report"):
        assert torch.equal(getattr(found, name).cpu(), getattr(expected, name)), name
    wanted = kept(*expected_stores)
    for name, field in kept(*stores).items():
        is_open = name in {"credit_ids", "credits"} and not done.state  # nobody's
        assert is_open or torch.equal(field.cpu(), wanted[name]), name
    return expected, done


@pytest.fixture(params=["cpu", simt.WHERE, pytest.param("cuda", marks=pytest.mark.gpu)])
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "simt":
        monkeypatch.setattr(ops, "settle_step", lambda *args: simt.ops().settle_step(*args))
    return str(request.param)


@pytest.mark.parametrize("looks_ahead", [False, True])
@pytest.mark.parametrize("size", [(1, 2, 4), (20, 5, 6), (33, 9, 4), (2, 40, 113)], ids=str)
def test_equals_the_torch_twin(size, looks_ahead, where):
    for seed in range(4 if where == "simt" else 12):
        check_equal(size, seed, where, looks_ahead=looks_ahead, remembers=seed % 2 == 1, plans=seed % 3 == 1)


@settings(max_examples=some_of(100), deadline=None)
@given(
    size=st.tuples(st.integers(1, 12), st.integers(2, 9), st.integers(1, 20)),
    seed=st.integers(0, 2**31),
    flags=st.fixed_dictionaries(dict.fromkeys(("drafts", "looks_ahead", "remembers", "plans"), st.booleans())),
)
def test_equals_the_torch_twin_on_any_step(size, seed, flags):
    check_equal(size, seed, "cpu", **flags)


def test_the_steps_of_these_tests_end_in_all_ways():
    ends = [check_equal((33, 9, 4), seed, "cpu", looks_ahead=True, remembers=True, plans=True) for seed in range(4)]
    came_over, finished = (
        torch.cat([getattr(done, name) for _, done in ends]) for name in ("came_over", "is_finished")
    )
    emitted = torch.cat([emission.report[: len(done.node), Column.FINISHED] for emission, done in ends]).bool()
    assert (emitted & ~finished).any(), "an answer ends before its block"
    assert came_over.any()
    assert (finished & ~came_over).any()
    assert not finished.all()
    report = torch.cat([emission.report for emission, _ in ends])
    assert (report.amax(0) > 0).tolist() == [column != Column.FAULTS for column in range(REPORT_LEN)]


MASKED = [5, 9, MASK, 6]


@pytest.mark.parametrize(
    ("ends", "canvas", "num_unmasked", "left"),
    [
        (Ends((9,), 12), MASKED, 1, 1),
        (Ends((4, 9), 13), MASKED, 1, 1),
        (Ends((9,), 14), MASKED, 1, None),  # too early to count
        (Ends((6,), 12), MASKED, 1, None),  # what is before it is not known yet
        (Ends((9,), 12), MASKED, 0, None),  # a void step: nothing of this block is its own
        (Ends((MASK,), 12), MASKED, 1, None),
        (Ends(limit=14), MASKED, 1, 1),
        (Ends(limit=13), MASKED, 1, 1),
        (Ends(limit=15), MASKED, 1, None),
        (Ends((5,), 0, NEVER), [5, MASK, MASK, MASK], 1, 3),
        (NO_ENDS, MASKED, 1, None),
    ],
)
def test_a_block_is_emitted_as_soon_as_all_is_known_before_its_answers_end(ends, canvas, num_unmasked, left, where):
    device = "cuda" if where == "cuda" else "cpu"
    root = torch.tensor([[[MASK] * 4]], device=device)
    nodes = to(device, Nodes(root, root == MASK, *ONE_NODE))
    done = trajectory(canvas)
    done = replace(done, num_unmasked=torch.tensor([num_unmasked]), is_finished=torch.tensor([False]))
    done = replace(to(device, done), candidates=to(device, done.candidates))
    ledger = to(device, Ledger(1, torch.tensor([13]), torch.tensor([9])))
    blocks = to(device, Blocks(torch.tensor([1]), None, torch.tensor([12])))
    found = []
    for each in (settle, native_settle):
        state, drafts = new_stores(3, 4, device)
        state.add_request(1, request_params(ends=ends, counts=(1,) * 4, times=(0.0,) * 4))
        state.apply_staged_writes()
        emission = each(state, drafts, blocks, nodes, done, ledger)
        row = emission.report[0].tolist()
        found.append((int(emission.num_sampled), int(emission.num_rejected), row[Column.FINISHED], row[Column.LEFT]))
        assert state.canvas[1].tolist() == (canvas if left is None else [MASK] * 4)
    assert found[0] == found[1] == ((0, 9, 0, 0) if left is None else (3, 6, 1, left))


def test_a_partial_block_emits_what_was_unknown_of_it():
    nodes = Nodes(torch.tensor([[[5, 6, MASK, MASK]]]), torch.tensor([[[False, False, True, True]]]), *ONE_NODE)
    done = trajectory([5, 6, 7, 8])
    state, drafts = new_stores(3, 4)
    ledger = Ledger(2, torch.tensor([14]), torch.tensor([9]), torch.tensor([[0], [1], [4]]))
    found = native_settle(state, drafts, Blocks(torch.tensor([1]), None, torch.tensor([12])), nodes, done, ledger)
    assert found.sampled[0, :2].tolist() == [7, 8]
    assert (found.num_sampled.tolist(), found.num_rejected.tolist()) == ([2, 0], [7, 0])
    row = dict(zip(Column, found.report[0].tolist(), strict=False))
    names = ("FORWARDS", "REFRESHES", "UNMASKED", "ACCEPTED", "FINISHED", "STORED", "WROTE", "COMMITS")
    assert [row[Column[name]] for name in names] == [1, 0, 2, 0, 1, 12, 4, 1]
    assert state.canvas.tolist() == [[77] * 4, [MASK] * 4, [77] * 4]
    assert drafts.is_known.tolist() == [True, False, True]


ONE_NODE = (torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.int64))


def trajectory(canvas: list[int]) -> Trajectory:
    """Make the end of one request's block in one step."""
    end, zero, yes = torch.tensor([canvas]), torch.tensor([0]), torch.tensor([True])
    ids = torch.zeros(1, 4, MAX_CANDIDATES, dtype=torch.int64)
    return Trajectory(end, end, zero[:, None], end, zero, zero + 1, zero + 2, yes, ~yes, Candidates(ids, ids.double()))


def native_args(seed: int = 1) -> list[Any]:
    """Return the arguments of a call of the op."""
    taken: list[Any] = []
    step, num_slots = random_step((2, 3, 4), seed, looks_ahead=True, remembers=True, plans=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "settle_step", lambda *args: taken.extend(args) or [torch.zeros(1)] * 4)
        native_settle(*new_stores(num_slots, 4), *step)
    return taken


@pytest.mark.usefixtures("collected")
def test_opcheck():
    """It is in no compiled graph: torch cannot trace what both writes to a list and returns one."""
    ops.require("settle_step", "cpu")
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.vllm_dllm.settle_step.default, native_args(), test_utils=checks)


def change(group: int, index: int, new: Any) -> Any:
    return lambda args: args[group].__setitem__(index, new(args[group][index]))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (change(0, 0, lambda it: it[0]), "nodes must begin with canvas [num_reqs, num_nodes, block_length]"),
        (change(0, 1, lambda it: it.long()), "nodes.is_valid must be Bool, got Long; convert it with .to()"),
        (change(0, 2, lambda it: it[:1]), "nodes.depth must be [2, 3], got [1, 3]; sizes follow from nodes.canvas"),
        (lambda args: args[1].pop(), "done must be 11 tensors, got 10; give canvas, next_canvas, "),
        (change(1, 8, lambda it: it[..., :7]), "done.log_probs must be [2, 4, 8], got [2, 4, 7]; sizes follow from"),
        (change(1, 9, lambda it: it.int()), "done.credit_ids must be Long, got Int; convert it with .to()"),
        (change(2, 0, lambda it: it.int()), "requests.slots must be Long, got Int; convert it with .to()"),
        (change(2, 4, lambda it: it[:2]), "requests.planned must be [3, 2], got [2, 2]; sizes follow from"),
        (lambda args: args[2].append(args[2][0]), "requests must be 5 tensors, got 6; give slots, start, "),
        (change(3, 0, lambda it: it[:, :3]), "stores.canvas must be [3, 4], got [3, 3]; sizes follow from"),
        (change(3, 1, lambda it: it.mT.contiguous().mT), "stores.token_ids must be contiguous, got strides "),
        (lambda args: args[3].pop(), "stores must be 7 tensors, got 6; give the slots' canvas, "),
        (change(4, 1, lambda it: it[:1]), "ends.bounds must be [2, 3], got [1, 3]; sizes follow from"),
        (lambda args: args[4].pop(), "ends must be 2 tensors, got 1; give ids and bounds by slot"),
        (lambda args: args.__setitem__(5, 1), "num_batch must be 2 or more, got 1; count the whole batch"),
        (lambda args: args.__setitem__(6, 10), "report_len must be above 10, got 10; drafts are counted behind"),
    ],
)
def test_bad_calls_say_what_is_wrong(spoil, message):
    args = native_args()
    spoil(args)
    with pytest.raises(RuntimeError, match=re.escape(f"settle_step: {message}")):
        ops.settle_step(*args)


def test_the_columns_of_the_report_have_one_order():
    header = (simt.ROOT / "csrc/include/dllm/settle_step.h").read_text()
    (body,) = re.findall(r"enum ReportColumn : int64_t \{([^}]*)\}", header)
    names = [name.strip().removeprefix("k").upper() for name in body.split(",") if name.strip()]
    assert names == [column.name for column in Column]
