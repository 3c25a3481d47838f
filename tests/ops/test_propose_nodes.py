"""`propose_nodes` equals `draft.propose.propose`, on each device, for requests in any slots."""

import random
import re
from dataclasses import dataclass, fields, replace

import pytest
import torch
from torch import Tensor

from tests.ops import simt
from vllm_dllm.draft.compile import compile_graph
from vllm_dllm.draft.graph import MAX_CANDIDATES, DraftGraph, Formula
from vllm_dllm.draft.propose import DraftNoise, Drafts, Roots, likeliest_end, propose
from vllm_dllm.draft.readiness import Readiness
from vllm_dllm.ops import propose_nodes
from vllm_dllm.unmask.policy import POLICY_IDS
from vllm_dllm.unmask.stats import Candidates

MASK, VOCAB = 3, 50
CPU = torch.device("cpu")
BLOCK_LENGTHS = [1, 4, 7, 33, 113]
STEPS = [None, 1, 2]


def random_graph(tokens_per_step: int | None, seed: int) -> DraftGraph:
    rng = random.Random(seed)
    formulas: set[Formula] = set()
    for _ in range(8):
        ranks = sorted(rng.sample(range(rng.choice([4, 9])), rng.randint(1, 4)))
        formulas.add(tuple((rank, rng.choice([0, 0, 1, 2])) for rank in ranks))
    if tokens_per_step:  # with all that the formulas grow from
        sizes = range(tokens_per_step, 5, tokens_per_step)
        formulas = {f[:size] for f in formulas for size in sizes if len(f) >= size} | {
            ((0, 0), (1, 0))[:tokens_per_step]
        }
    ordered = tuple(sorted(formulas, key=lambda formula: (len(formula), formula)))
    weights = [rng.uniform(-2, 2) for _ in range(4)]
    return DraftGraph(
        ordered,
        tokens_per_step,
        counts=tuple(rng.randint(0, 90) for _ in ordered),
        num_anchors=100,
        readiness=Readiness(1.5 + weights[0] / 4, (weights[1], weights[2]), weights[3]),
        expected=tuple(rng.uniform(0, 90) for _ in ordered),
    )


def random_roots(num_reqs: int, block_length: int, seed: int) -> Roots:
    """Draw canvases of all degrees of completion; no two positions are equally ready."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    sharpness = 10 * uniform(num_reqs, block_length, 1)
    log_probs = (sharpness * uniform(num_reqs, block_length, VOCAB)).log_softmax(-1)
    top, token_ids = log_probs.topk(MAX_CANDIDATES)
    is_masked = uniform(num_reqs, block_length) < 1.2 * uniform(num_reqs, 1)
    canvas = torch.randint(MASK + 1, VOCAB, is_masked.shape, generator=generator).masked_fill(is_masked, MASK)
    return Roots(canvas, is_masked, ~is_masked & (uniform(*is_masked.shape) < 0.3), Candidates(token_ids, top))


def random_noise(num_reqs: int, block_length: int, seed: int) -> DraftNoise:
    generator = torch.Generator().manual_seed(seed)

    def choose(*values: float) -> Tensor:
        return torch.tensor(values)[torch.randint(len(values), (num_reqs,), generator=generator)]

    start = torch.randint(0, 2**40, (num_reqs, 1), generator=generator)
    return DraftNoise(
        seed=torch.randint(-(2**63), 2**63 - 1, (num_reqs,), generator=generator),
        position=start + torch.arange(block_length),
        temperature=choose(0.0, 0.7, 1.0).double(),
        top_k=choose(0, 2, 5, 99).long(),
        top_p=choose(1.0, 1.0, 0.8, 0.3).double(),
        is_random=choose(0, 0, 1).bool(),
    )


@dataclass(frozen=True)
class Case:
    graph: DraftGraph
    roots: Roots
    noise: DraftNoise | None
    sub_block_length: int = 0

    def rounding(self) -> float:
        """Bound what two orders of summation may differ by: a unit roundoff for each term of each step on the way.

        A step's terms are as large as the largest readiness, which is bounded by the least confidence there is.
        """
        readiness = self.graph.readiness
        log_prob = -float(self.roots.candidates.log_probs.min())
        ready = abs(readiness.slope) * (log_prob + 28) + 4 * sum(map(abs, readiness.near)) + abs(readiness.bias)
        terms = len(self.graph) * (self.roots.canvas.shape[1] + 4)
        return 2 * torch.finfo(torch.float64).eps * terms * (ready + log_prob)


def case(block_length: int, tokens_per_step: int | None, seed: int, *, is_noisy: bool, num_reqs: int = 13) -> Case:
    noise = random_noise(num_reqs, block_length, seed) if is_noisy else None
    return Case(random_graph(tokens_per_step, seed), random_roots(num_reqs, block_length, seed), noise)


def found(given: Case, num_drafts: int, where: str, *, looks_ahead: bool = False) -> list[Tensor]:
    """Call the op; returns its results on the CPU."""
    call = arguments(given, num_drafts, looks_ahead=looks_ahead)
    if where == "simt":
        return list(simt.ops().propose_nodes(*call))
    moved = [[each.to(where) for each in arg] if isinstance(arg, list) and arg is not call[1] else arg for arg in call]
    return [result.cpu() for result in propose_nodes(*moved)]


def drafts_of(given: Case, num_drafts: int, where: str) -> Drafts:
    """Return the drafts that the op makes; what is in front of them has to be the requests' canvases."""
    canvas, is_masked, is_valid, depth, node, log_reach = found(given, num_drafts, where)
    assert torch.equal(canvas[:, 0], given.roots.canvas)
    assert torch.equal(is_masked, canvas == MASK)
    assert is_valid[:, 0].all()
    assert not depth[:, 0].any()
    return Drafts(canvas[:, 1:], is_valid[:, 1:], node, depth[:, 1:], log_reach)


def check_equal(given: Case, num_drafts: int, where: str, roots: Roots | None = None) -> Drafts:
    """Compare with the torch twin, which may be shown other roots; returns the drafts."""
    expected = propose(compile_graph(given.graph, CPU), roots or given.roots, given.noise, num_drafts)
    drafts = drafts_of(given, num_drafts, where)
    assert torch.equal(drafts.node, expected.node)
    assert torch.equal(drafts.is_valid, expected.is_valid)
    assert torch.equal(drafts.depth, expected.depth)
    assert torch.equal(drafts.canvas[drafts.is_valid], expected.canvas[drafts.is_valid])
    torch.testing.assert_close(drafts.log_reach, expected.log_reach, rtol=0, atol=given.rounding())
    return drafts


@pytest.mark.parametrize("is_noisy", [False, True], ids=["greedy", "noisy"])
@pytest.mark.parametrize("tokens_per_step", STEPS)
@pytest.mark.parametrize("block_length", BLOCK_LENGTHS)
def test_equals_the_torch_twin(block_length, tokens_per_step, is_noisy):
    num_valid = 0
    for seed in range(8):
        given = case(block_length, tokens_per_step, seed, is_noisy=is_noisy)
        num_valid += int(check_equal(given, len(given.graph), "cpu").is_valid.sum())
    assert num_valid > 0 or block_length == 1  # the only draft of a block of one would be finished


@pytest.mark.slow("kernels")
@pytest.mark.parametrize("is_noisy", [False, True], ids=["greedy", "noisy"])
@pytest.mark.parametrize("block_length", BLOCK_LENGTHS)
def test_the_emulated_kernel_equals_the_cpu_bitwise(block_length, is_noisy):
    for seed in range(6):
        given = case(block_length, STEPS[seed % 3], seed, is_noisy=is_noisy)
        by_cpu, by_cuda = (drafts_of(given, len(given.graph), where) for where in ("cpu", "simt"))
        for field in fields(Drafts):
            assert torch.equal(getattr(by_cuda, field.name), getattr(by_cpu, field.name))


@pytest.mark.parametrize("num_drafts", [0, 1, 3])
def test_keeps_the_best(num_drafts):
    drafts = check_equal(case(33, 1, 5, is_noisy=True), num_drafts, "cpu")
    assert drafts.canvas.shape == (13, num_drafts, 33)


def test_equal_scores_go_to_the_lowest_node():
    roots = random_roots(2, 7, 0)
    equal = torch.tensor([0.5, 0.25, 0.125], dtype=torch.float64).log().expand(2, 7, 3).contiguous()
    ids = roots.candidates.token_ids[..., :3].contiguous()
    roots = replace(roots, is_new=torch.zeros(2, 7, dtype=torch.bool), candidates=Candidates(ids, equal))
    formulas = tuple(((rank, vocab_rank),) for vocab_rank in (1, 0) for rank in range(3))
    check_equal(Case(DraftGraph(formulas, 1), roots, None), 6, "cpu")


@pytest.mark.parametrize("is_noisy", [False, True], ids=["greedy", "noisy"])
def test_a_request_alone_is_as_in_company(is_noisy):
    given = case(33, None, 3, is_noisy=is_noisy, num_reqs=7)
    together = drafts_of(given, 8, "cpu")

    def only(value, request: int):
        if value is None or isinstance(value, Tensor):
            return value if value is None else value[request : request + 1]
        return replace(value, **{field.name: only(getattr(value, field.name), request) for field in fields(value)})

    for request in range(7):
        alone = drafts_of(Case(given.graph, only(given.roots, request), only(given.noise, request)), 8, "cpu")
        for field in fields(Drafts):
            assert torch.equal(getattr(alone, field.name)[0], getattr(together, field.name)[request])


@pytest.mark.parametrize("where", ["cpu", simt.WHERE])
@pytest.mark.parametrize("log_prob", [torch.nan, -torch.inf])
def test_probabilities_that_are_none_give_drafts_that_can_be_evaluated(log_prob, where):
    given = case(33, None, 4, is_noisy=True)
    given.roots.candidates.log_probs[:, ::2] = log_prob
    given = replace(given, graph=replace(given.graph, readiness=Readiness(0.0, (0.0, 0.0), 0.0)))
    num_nodes = len(given.graph)
    drafts = drafts_of(given, num_nodes, where)
    assert torch.equal(drafts.node.sort().values, torch.arange(1, num_nodes + 1).expand(13, -1))
    choices = torch.cat([given.roots.canvas[..., None], given.roots.candidates.token_ids], -1)
    assert (drafts.canvas[..., None] == choices[:, None]).any(-1).all()


def test_no_requests():
    given = case(7, None, 1, is_noisy=True, num_reqs=0)
    drafts = drafts_of(given, 3, "cpu")
    assert (drafts.canvas.shape, drafts.log_reach.shape) == ((0, 3, 7), (0, 3))


NUM_OTHERS = 3  # slots of nobody


def arguments(given: Case, num_drafts: int, *, looks_ahead: bool = False, seq_len: int = 2**50) -> list[object]:
    """The op's arguments; each request is in some slot, and what other slots hold is of nobody's drafts."""
    graph, roots, noise = compile_graph(given.graph, CPU), given.roots, given.noise
    packed = [getattr(graph.packed, field.name) for field in fields(graph.packed)]
    readiness, num_reqs = given.graph.readiness, len(roots.canvas)
    tokens = () if graph.tokens is None else (graph.tokens.slope, graph.tokens.slope_beside_new, *graph.tokens.same)
    weights = [readiness.slope, *readiness.near, readiness.bias, *tokens]
    slots = torch.randperm(num_reqs + NUM_OTHERS, generator=torch.Generator().manual_seed(num_reqs))[:num_reqs]

    def by_slot(values: Tensor) -> Tensor:
        others = values.new_zeros(num_reqs + NUM_OTHERS, *values.shape[1:])
        others[slots] = values
        return others

    start = torch.zeros(num_reqs, dtype=torch.int64) if noise is None else noise.position[:, 0].contiguous()
    was_masked, is_known = roots.is_masked | roots.is_new, torch.ones(num_reqs, dtype=torch.bool)
    memory = (roots.candidates.token_ids, roots.candidates.log_probs, was_masked, is_known, start * 0 + seq_len)
    params = []
    if noise is not None:
        policy = torch.where(noise.is_random, POLICY_IDS["random"], POLICY_IDS["static"])
        params = [by_slot(each) for each in (policy, noise.seed, noise.top_k, noise.temperature, noise.top_p)]
    state = [by_slot(each) for each in (roots.canvas, *memory)]
    counts = (graph.is_one_by_one, graph.num_vocab_ranks, num_drafts)
    requests = [slots, start] if roots.terms is None else [slots, start, roots.terms]
    return [packed, weights, requests, state, params, *counts, looks_ahead, MASK, given.sub_block_length]


@pytest.mark.parametrize("is_noisy", [False, True], ids=["greedy", "noisy"])
@pytest.mark.parametrize("block_length", BLOCK_LENGTHS)
def test_the_end_of_a_look_ahead_equals_the_torch_twin(block_length, is_noisy):
    for seed in range(6):
        given = case(block_length, STEPS[seed % 3], seed, is_noisy=is_noisy)
        expected = likeliest_end(compile_graph(given.graph, CPU), given.roots, given.noise)
        num_drafts = seed % 3
        alone = found(given, num_drafts, "cpu")
        for where in simt.PLACES:
            canvas, is_masked, is_valid, depth, node, log_reach, end = found(given, num_drafts, where, looks_ahead=True)
            assert torch.equal(end, expected)
            next_root = [canvas[:, -1], is_masked[:, -1], is_valid[:, -1], depth[:, -1]]
            assert (next_root[0] == MASK).all()
            assert (next_root[1].all(), next_root[2].all()) == (True, True)
            assert torch.equal(next_root[3], given.roots.is_masked.sum(1))
            before = [canvas[:, :-1], is_masked[:, :-1], is_valid[:, :-1], depth[:, :-1], node, log_reach]
            assert all(map(torch.equal, before, alone))


@pytest.mark.parametrize("where", ["cpu", simt.WHERE])
def test_nothing_is_valid_of_a_block_without_a_step_and_no_look_ahead_of_the_last_block(where):
    given = case(7, None, 3, is_noisy=False)
    call = arguments(given, 4, looks_ahead=True, seq_len=8)  # one more position than the blocks have
    (slots, _), state = call[2], call[3]
    state[4][slots[0]] = False  # is_known
    state[5][slots[1]] = 7  # seq_len
    op = propose_nodes if where == "cpu" else simt.ops().propose_nodes
    is_valid = op(*call)[2]
    assert is_valid[:, 0].all()
    assert not is_valid[0, 1:].any()
    assert is_valid[1:, 1].any()
    assert is_valid[:, -1].tolist() == [False, False] + [True] * 11


@pytest.mark.usefixtures("collected")
@pytest.mark.parametrize("is_noisy", [False, True], ids=["greedy", "noisy"])
def test_opcheck(is_noisy):
    call = arguments(case(7, 1, 0, is_noisy=is_noisy), 3)
    propose_nodes(*call)
    torch.library.opcheck(torch.ops.vllm_dllm.propose_nodes.default, tuple(call))


@pytest.mark.usefixtures("collected")
def test_can_be_traced():
    def canvas(start: Tensor) -> Tensor:
        return propose_nodes(graph, weights, [slots, start], *rest)[0] + 1

    graph, weights, (slots, start), *rest = arguments(case(7, 1, 0, is_noisy=True), 3, looks_ahead=True)
    assert torch.equal(torch.compile(canvas, fullgraph=True, backend="eager")(start), canvas(start))


WRONG = {
    "graph": ((0, slice(2)), "graph must be 3 tensors, got 2; give the fields of draft.compile.PackedGraph"),
    "nodes": ((0, 0, lambda t: t[:, :4]), "graph.nodes must be [{n}, 5], got [{n}, 4]; sizes follow from"),
    "pairs": ((0, 1, lambda t: t.long()), "graph.pairs must be Int, got Long; convert it with .to()"),
    "weights": ((1, slice(3)), "weights must be 4 or 10 numbers, got 3; give slope, near[0], near[1] and bias, and"),
    "requests": ((2, slice(1)), "requests must be 2 tensors, got 1; give slots and start, and with a ranker terms"),
    "slots": ((2, 0, lambda t: t + 99), "allowed are 0..15; give the slots of the requests"),
    "start": ((2, 1, lambda t: t[1:]), "requests.start must be [13], got [12]; sizes follow from requests.slots"),
    "state": ((3, slice(5)), "state must be 6 tensors, got 5; give canvas, token_ids, log_probs, was_masked, is_known"),
    "canvas": ((3, 0, lambda t: t[0]), "state must begin with canvas [num_slots, block_length]; give one canvas for"),
    "was_masked": ((3, 3, lambda t: t[:, 1:]), "state.was_masked must be [16, 7], got [16, 6]; sizes follow from"),
    "candidates": ((3, 1, lambda t: t[..., :0]), "num_candidates in {v}..8, got [16, 7, 0]; keep as many as the graph"),
    "log_probs": ((3, 2, lambda t: t.mT.contiguous().mT), "state.log_probs must be contiguous, got strides [56, 1, 7]"),
    "params": ((4, slice(4)), "params must be 5 tensors, got 4; give policy, seed, top_k, temperature and top_p"),
    "seed": ((4, 1, lambda t: t[:1]), "params.seed must be [16], got [1]; sizes follow from"),
    "parent": ((0, 0, lambda t: t.clone().fill_(10**8)), "nodes[0] has parent 100000000 and end_pair 100000000, "),
    "end_pair": (
        (0, 0, lambda t: t.clone().index_fill_(1, torch.tensor([4]), -1)),
        "graph.nodes[0] has parent 0 and end",
    ),
    "pair": ((0, 1, lambda t: t - 9), "allowed are [0 or more, 0.."),
    "num_drafts": ((7, 99), "num_drafts is 99, the graph has {n} nodes; choose 0..{n}"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_bad_calls_say_what_is_wrong(wrong):
    (argument, *change), message = WRONG[wrong]
    given = case(7, 1, 0, is_noisy=True)
    call = arguments(given, 3)
    if len(change) == 2:
        call[argument][change[0]] = change[1](call[argument][change[0]])
    elif isinstance(change[0], slice):
        call[argument] = call[argument][change[0]]
    else:
        call[argument] = change[0]
    text = message.format(n=len(given.graph), v=1 + given.graph.max_vocab_rank)
    with pytest.raises(RuntimeError, match=f"propose_nodes: .*{re.escape(text)}"):
        propose_nodes(*call)


@pytest.mark.gpu
@pytest.mark.parametrize("is_noisy", [False, True], ids=["greedy", "noisy"])
@pytest.mark.parametrize("block_length", BLOCK_LENGTHS)
def test_cuda_equals_the_torch_twin(block_length, is_noisy):
    for seed in range(5):
        given = case(block_length, STEPS[seed % 3], seed, is_noisy=is_noisy)
        check_equal(given, len(given.graph), "cuda")


@pytest.mark.gpu
def test_cuda_can_be_captured_in_a_graph():
    """A capture fails unless the launch goes to the current stream and nothing synchronises."""
    call = arguments(case(33, 1, 0, is_noisy=True), 3)
    moved = [[each.cuda() for each in arg] if isinstance(arg, list) and arg is not call[1] else arg for arg in call]
    expected = propose_nodes(*moved)[5]
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        log_reach = propose_nodes(*moved)[5]
    log_reach.zero_()
    captured.replay()
    assert torch.equal(log_reach, expected)
