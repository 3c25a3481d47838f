"""The draft graph as a value: parents, depths, order, and how a formula is written."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_dllm.draft.graph import DraftGraph, Formula, formula_text

formulas = st.dictionaries(st.integers(0, 5), st.integers(0, 1), min_size=1, max_size=4).map(
    lambda pairs: tuple(sorted(pairs.items()))
)
any_graphs = st.lists(formulas, min_size=1, max_size=12, unique=True).map(
    lambda nodes: DraftGraph(tuple(nodes)).parents_first()
)


def connected(nodes: list[Formula], tokens_per_step: int) -> list[Formula]:
    """The nodes that hang on the root when every step adds so many pairs."""
    sizes = sorted((node for node in nodes if len(node) % tokens_per_step == 0), key=len)
    kept: list[frozenset] = [frozenset()]
    for node in map(frozenset, sizes):
        if any(parent < node and len(node) - len(parent) == tokens_per_step for parent in kept):
            kept.append(node)
    return [node for node in nodes if frozenset(node) in kept]


stepped_graphs = (
    st.tuples(st.lists(formulas, min_size=1, max_size=16, unique=True), st.integers(1, 2))
    .map(lambda drawn: (connected(*drawn), drawn[1]))
    .filter(lambda drawn: drawn[0])
    .map(lambda drawn: DraftGraph(tuple(drawn[0]), drawn[1]).parents_first())
)
graphs = any_graphs | stepped_graphs


def test_a_chain_has_one_node_per_depth() -> None:
    graph = DraftGraph.chain(3)
    assert graph.formulas == (((0, 0),), ((0, 0), (1, 0)), ((0, 0), (1, 0), (2, 0)))
    assert graph.depths == (1, 2, 3)
    assert graph.parents == ((0,), (1,), (2,))


def node_sets(graph: DraftGraph) -> list[set]:
    return [set(), *map(set, graph.formulas)]


@given(graphs)
def test_parents_are_strict_subsets_that_precede(graph: DraftGraph) -> None:
    sets = node_sets(graph)
    for node, parents in enumerate(graph.parents, start=1):
        assert parents
        assert all(sets[parent] < sets[node] and parent < node for parent in parents)
        assert list(parents) == sorted(set(parents))


@given(any_graphs)
def test_without_a_step_size_the_parents_are_the_largest_subsets(graph: DraftGraph) -> None:
    sets = node_sets(graph)
    for node, parents in enumerate(graph.parents, start=1):
        subsets = [other for other in range(len(sets)) if sets[other] < sets[node]]
        assert all(any(sets[other] <= sets[parent] for parent in parents) for other in subsets)
        assert not any(sets[a] < sets[b] for a, b in itertools.permutations(parents, 2))


@given(stepped_graphs)
def test_with_a_step_size_parents_are_one_step_back(graph: DraftGraph) -> None:
    sets = node_sets(graph)
    for node, parents in enumerate(graph.parents, start=1):
        assert {len(sets[node]) - len(sets[parent]) for parent in parents} == {graph.tokens_per_step}
    assert graph.depths == tuple(len(formula) // graph.tokens_per_step for formula in graph.formulas)


@given(graphs)
def test_depth_is_one_more_than_the_nearest_parent(graph: DraftGraph) -> None:
    depths = [0, *graph.depths]
    for node, parents in enumerate(graph.parents, start=1):
        assert depths[node] == 1 + min(depths[parent] for parent in parents)


@given(graphs, st.randoms(use_true_random=False))
def test_the_order_of_listing_changes_no_parents(graph: DraftGraph, random) -> None:
    shuffled = list(zip(graph.formulas, range(len(graph)), strict=True))
    random.shuffle(shuffled)
    listed = DraftGraph(tuple(formula for formula, _ in shuffled), graph.tokens_per_step, tuple(n for _, n in shuffled))
    ordered = listed.parents_first()

    def by_formula(value: DraftGraph) -> dict[Formula, set[Formula]]:
        nodes = [(), *value.formulas]
        return {nodes[n]: {nodes[parent] for parent in value.parents[n - 1]} for n in range(1, len(nodes))}

    assert by_formula(ordered) == by_formula(graph)
    assert all(
        graph.formulas[count] == formula for formula, count in zip(ordered.formulas, ordered.counts, strict=True)
    )


@given(graphs)
def test_a_graph_in_order_stays_as_it_is(graph: DraftGraph) -> None:
    assert graph.parents_first() == graph


@given(graphs, st.integers(1, 16))
def test_the_first_nodes_are_a_graph(graph: DraftGraph, num_nodes: int) -> None:
    first = graph.only(range(1, 1 + min(num_nodes, len(graph))))
    assert first.formulas == graph.formulas[:num_nodes]
    assert all(first.parents)
    assert first.depths == graph.depths[:num_nodes]


def test_a_child_moves_behind_its_last_parent() -> None:
    a, b, ab, c = ((0, 0),), ((1, 0),), ((0, 0), (1, 0)), ((2, 0),)
    graph = DraftGraph((ab, a, c, b), 1, (1, 4, 3, 2), 9).parents_first()
    assert graph == DraftGraph((a, c, b, ab), 1, (4, 3, 2, 1), 9)
    assert graph.parents == ((0,), (0,), (0,), (1, 3))


def test_largest_ranks() -> None:
    graph = DraftGraph((((0, 0), (7, 0)), ((2, 3),)))
    assert graph.max_vocab_rank == 3
    assert DraftGraph(()).max_vocab_rank == 0


@pytest.mark.parametrize(
    ("formula", "text"),
    [
        ((), "{}"),
        (((0, 0),), "{0}"),
        (((0, 0), (1, 0), (2, 0), (4, 0)), "{0-2, 4}"),
        (((0, 0), (1, 2), (2, 0)), "{0, 1:2, 2}"),
    ],
)
def test_a_formula_is_written_in_runs(formula: Formula, text: str) -> None:
    assert formula_text(formula) == text
