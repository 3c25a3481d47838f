"""`propose_nodes` equals `draft.propose.propose`, on each device."""

import random
import re
from dataclasses import dataclass, fields, replace

import pytest
import torch
from torch import Tensor

from tests.ops import simt
from vllm_dllm.draft.compile import compile_graph
from vllm_dllm.draft.graph import MAX_CANDIDATES, DraftGraph, Formula
from vllm_dllm.draft.native import native_propose
from vllm_dllm.draft.propose import DraftNoise, Drafts, Roots, propose
from vllm_dllm.draft.readiness import Readiness
from vllm_dllm.ops import propose_nodes
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


def to(value, device):
    """Move a dataclass of tensors."""
    if value is None or isinstance(value, Tensor):
        return value if value is None else value.to(device)
    return replace(value, **{field.name: to(getattr(value, field.name), device) for field in fields(value)})


def drafts_of(given: Case, num_drafts: int, where: str) -> Drafts:
    if where == "simt":
        return Drafts(*simt.ops().propose_nodes(*arguments(given, num_drafts)))
    graph = compile_graph(given.graph, torch.device(where))
    return to(native_propose(graph, to(given.roots, where), to(given.noise, where), num_drafts), "cpu")


def check_equal(given: Case, num_drafts: int, where: str) -> Drafts:
    """Compare with the torch twin; returns the drafts."""
    expected = propose(compile_graph(given.graph, CPU), given.roots, given.noise, num_drafts)
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
    graph = compile_graph(given.graph, CPU)
    together = native_propose(graph, given.roots, given.noise, 8)

    def only(value, request: int):
        if value is None or isinstance(value, Tensor):
            return value if value is None else value[request : request + 1]
        return replace(value, **{field.name: only(getattr(value, field.name), request) for field in fields(value)})

    for request in range(7):
        alone = native_propose(graph, only(given.roots, request), only(given.noise, request), 8)
        for field in fields(Drafts):
            assert torch.equal(getattr(alone, field.name)[0], getattr(together, field.name)[request])


@pytest.mark.parametrize("where", ["cpu", "simt"])
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
    drafts = native_propose(compile_graph(given.graph, CPU), given.roots, given.noise, 3)
    assert drafts.canvas.shape == (0, 3, 7)
    assert drafts.log_reach.shape == (0, 3)


def arguments(given: Case, num_drafts: int) -> list[object]:
    """The op's arguments."""
    graph = compile_graph(given.graph, CPU)
    packed = [getattr(graph.packed, field.name) for field in fields(graph.packed)]
    noise = [] if given.noise is None else [getattr(given.noise, field.name) for field in fields(given.noise)]
    roots, readiness = given.roots, given.graph.readiness
    tensors = [roots.canvas, roots.is_masked, roots.is_new, roots.candidates.token_ids, roots.candidates.log_probs]
    weights = [readiness.slope, *readiness.near, readiness.bias]
    return [packed, weights, tensors, noise, graph.is_one_by_one, graph.num_vocab_ranks, num_drafts]


@pytest.mark.parametrize("is_noisy", [False, True], ids=["greedy", "noisy"])
def test_opcheck(is_noisy):
    call = arguments(case(7, 1, 0, is_noisy=is_noisy), 3)
    propose_nodes(*call)
    torch.library.opcheck(torch.ops.vllm_dllm.propose_nodes.default, tuple(call))


def test_can_be_traced():
    given = case(7, 1, 0, is_noisy=True)
    graph = compile_graph(given.graph, CPU)

    def canvas(roots: Roots) -> Tensor:
        return native_propose(graph, roots, given.noise, 3).canvas + 1

    assert torch.equal(torch.compile(canvas, fullgraph=True, backend="eager")(given.roots), canvas(given.roots))


WRONG = {
    "graph": ((0, slice(2)), "graph must be 3 tensors, got 2; give the fields of draft.compile.PackedGraph"),
    "nodes": ((0, 0, lambda t: t[:, :4]), "graph.nodes must be [{n}, 5], got [{n}, 4]; sizes follow from"),
    "pairs": ((0, 1, lambda t: t.long()), "graph.pairs must be Int, got Long; convert it with .to()"),
    "readiness": ((1, slice(3)), "readiness must be 4 numbers, got 3; give slope, near[0], near[1] and bias"),
    "roots": ((2, slice(4)), "roots must be 5 tensors, got 4; give canvas, is_masked, is_new, token_ids and log_probs"),
    "canvas": ((2, 0, lambda t: t[0]), "roots.canvas must be [num_reqs, block_length], got [7]; give one canvas for"),
    "is_new": ((2, 2, lambda t: t[:, 1:]), "roots.is_new must be [13, 7], got [13, 6]; sizes follow from roots.canvas"),
    "candidates": ((2, 3, lambda t: t[..., :0]), "num_candidates in {v}..8, got [13, 7, 0]; keep as many as the graph"),
    "log_probs": ((2, 4, lambda t: t.mT.contiguous().mT), "roots.log_probs must be contiguous, got strides [56, 1, 7]"),
    "noise": ((3, slice(5)), "draft_noise must be 6 tensors, got 5; give the fields of draft.propose.DraftNoise"),
    "position": ((3, 1, lambda t: t[:1]), "draft_noise.position must be [13, 7], got [1, 7]; sizes follow from"),
    "parent": (
        (0, 0, lambda t: t.clone().fill_(10**8)),
        "graph.nodes[0] has parent 100000000 and end_pair 100000000, ",
    ),
    "end_pair": (
        (0, 0, lambda t: t.clone().index_fill_(1, torch.tensor([4]), -1)),
        "graph.nodes[0] has parent 0 and end",
    ),
    "pair": ((0, 1, lambda t: t - 9), "allowed are [0 or more, 0.."),
    "num_drafts": ((6, 99), "num_drafts is 99, the graph has {n} nodes; choose 0..{n}"),
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
    given = to(case(33, 1, 0, is_noisy=True), "cuda")
    graph = compile_graph(given.graph, torch.device("cuda"))
    expected = native_propose(graph, given.roots, given.noise, 3)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        drafts = native_propose(graph, given.roots, given.noise, 3)
    drafts.log_reach.zero_()
    captured.replay()
    assert torch.equal(drafts.log_reach, expected.log_reach)
