"""An order ranker changes which drafts are made, never a token; whatever its weights are, it says finite numbers."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.draft.rankers import make_ranker
from tests.draft.test_exact import DREAM, LLADA, REFERENCE_RULES, SDAR, SyntheticModel, denoise, graphs, requests_of
from tests.ops.test_propose_nodes import MASK, case
from tests.suite.parts import some_of
from vllm_dllm.draft.calibrated import GraphDrafter
from vllm_dllm.draft.compile import compile_graph
from vllm_dllm.draft.native import native_nodes, torch_nodes
from vllm_dllm.draft.propose import propose
from vllm_dllm.draft.ranker import OrderRanker
from vllm_dllm.draft.ranker_shape import REACH
from vllm_dllm.reference import block_causal
from vllm_dllm.reference import decode as bidirectional
from vllm_dllm.reference.decode import KvPolicy
from vllm_dllm.unmask.schedule import UnmaskRules

WEIGHTS = ["small", "huge", "constant", "nan"]


@settings(max_examples=some_of(80), deadline=None)
@given(
    data=st.data(),
    block_length=st.sampled_from([1, 4, 7]),
    is_native=st.booleans(),
    rules=st.sampled_from([LLADA, DREAM, SDAR]),
    weights=st.sampled_from(WEIGHTS),
)
def test_any_ranker_is_lossless(
    data: st.DataObject, block_length: int, is_native: bool, rules: UnmaskRules, weights: str
) -> None:
    model = SyntheticModel(block_length, data.draw(st.integers(0, 99)), data.draw(st.sampled_from([0.0, 3.0, 12.0])))
    requests = data.draw(st.lists(requests_of(block_length, rules), min_size=1, max_size=4))
    graph = data.draw(graphs(block_length))
    ranker = make_ranker(weights, data.draw(st.integers(0, 99)))
    drafter = GraphDrafter(graph, choose=lambda _: native_nodes if is_native else torch_nodes, ranker=ranker.weights)
    tokens, forwards, accepted = denoise(
        model, requests, drafter, data.draw(st.integers(0, len(graph))), is_native=is_native, rules=rules
    )
    for i, request in enumerate(requests):
        options, prompt = request.reference(block_length), torch.tensor(request.tail, dtype=torch.int64)
        if rules is SDAR:
            reference = block_causal.generate(model, prompt, **options)  # type: ignore[arg-type]
        else:
            kv, kv_rules = KvPolicy("dual"), REFERENCE_RULES[rules]
            reference = bidirectional.generate(model, prompt, kv=kv, rules=kv_rules, **options)  # type: ignore[arg-type]
        assert tokens[i] == [*request.tail, *reference.tokens.tolist()]
        assert forwards[i] + accepted[i] == reference.nfe


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("log_prob", [torch.nan, -torch.inf, 0.0])
def test_what_is_added_is_finite(weights: str, log_prob: float) -> None:
    roots = case(9, 1, 0, is_noisy=False).roots
    roots.candidates.log_probs[::2] = log_prob
    found = make_ranker(weights).terms(roots.candidates.log_probs, roots.is_masked, roots.is_new)
    assert found.shape == (*roots.is_masked.shape, 1 + 2 * REACH)
    assert found.dtype == torch.float64
    assert found.isfinite().all()


def test_a_new_ranker_adds_nothing_and_a_strong_one_decides_the_order() -> None:
    given = case(9, 1, 3, is_noisy=False)
    graph = compile_graph(given.graph, torch.device("cpu"))
    plain, roots = propose(graph, given.roots, None), given.roots
    new = OrderRanker().eval().terms(roots.candidates.log_probs, roots.is_masked, roots.is_new)
    same = propose(graph, replace(roots, terms=new), None)
    assert torch.equal(same.canvas, plain.canvas)
    assert torch.equal(same.log_reach, plain.log_reach)
    # From the right, whatever the confidence: then the first draft of one position fills the last that is masked.
    new[..., REACH] = 1e3 * torch.arange(9)
    drafts = propose(graph, replace(roots, terms=new), None)
    has_two = roots.is_masked.sum(1) > 1
    last = 8 - roots.is_masked.flip(1).byte().argmax(1)
    is_first = (drafts.node == 1 + given.graph.formulas.index(((0, 0),))).byte().argmax(1)
    canvas = drafts.canvas[torch.arange(len(is_first)), is_first]
    assert (canvas.gather(1, last[:, None])[has_two] != MASK).all()
    assert has_two.any()


def test_neighbours_that_become_known_count_as_said() -> None:
    """The term of distance d of a position is added where the neighbour d behind it is filled."""
    given = case(7, 1, 5, is_noisy=False)
    readiness = given.graph.readiness
    terms = torch.zeros(1, 7, 1 + 2 * REACH, dtype=torch.float64)
    terms[0, 3, REACH + 2], terms[0, 3, REACH - 3], terms[0, 6, REACH - 4] = 5.0, 0.5, 7.0
    for new, wanted in (({5}, {3: 5.0}), ({0}, {3: 0.5}), ({0, 5}, {3: 5.5}), ({2}, {6: 7.0}), ({1, 6}, {})):
        is_new = torch.tensor([[i in new for i in range(7)]])
        added = readiness.near_new(is_new, terms) - readiness.near_new(is_new)
        expected = torch.tensor([[wanted.get(i, 0.0) for i in range(7)]], dtype=torch.float64)
        torch.testing.assert_close(added, expected)
