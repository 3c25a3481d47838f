"""The choice of nodes."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_dllm.calibrate.select import accept_length, count_formulas, select
from vllm_dllm.draft.graph import DraftGraph

A, B, AB, ABC = ((0, 0),), ((1, 0),), ((0, 0), (1, 0)), ((0, 0), (1, 0), (2, 0))
OBJECTIVES = ("gain", "degree-0", "degree-1", "full")


def test_gain_takes_what_lengthens_the_walks_most():
    paths = [(A, AB, ABC)] * 4 + [(B, AB)] * 3 + [(B,)] * 3
    # B adds 6 steps, then A 4 and with it AB 4 + 3.
    assert select(paths, 4, 1) == [B, A, AB, ABC]


def test_gain_counts_a_node_with_two_parents_for_both():
    paths = [(A, AB)] * 5 + [(B, AB)] * 4 + [(A, ((0, 0), (2, 0)))] * 6
    assert select(paths, 3, 1) == [A, ((0, 0), (2, 0)), AB]
    # With B chosen, AB saves a step behind each of them.
    assert select([*paths, (B, AB), (B, AB), (B, AB)], 4, 1) == [A, B, AB, ((0, 0), (2, 0))]


def test_sums_of_counts():
    paths = [(A, AB, ABC)] * 5 + [(B, AB)] * 4 + [(B,)] * 2
    counts = count_formulas(paths)
    assert counts == {A: 5, B: 6, AB: 9, ABC: 5}
    assert select(paths, 4, 1, "degree-0") == [B, AB, A, ABC]
    # AB: 9 and its parent's 6, and 5 more when A is there; ABC: 5 and 9.
    assert select(paths, 4, 1, "degree-1") == [B, AB, ABC, A]
    assert select(paths, 4, 1, "full") == [B, AB, ABC, A]


def test_nothing_to_choose_from():
    assert all(select([(), ()], 3, 1, objective) == [] for objective in OBJECTIVES)


def cumulative(steps):
    """A path: each step adds its positions, with vocab rank 0 or 1."""
    path, pairs = [], []
    for step in steps:
        pairs += step
        path.append(tuple(sorted(pairs)))
    return tuple(path)


@st.composite
def path_lists(draw, most_per_step):
    paths = []
    for _ in range(draw(st.integers(1, 25))):
        ranks = draw(st.permutations(range(5)))[: draw(st.integers(0, 4))]
        pairs, steps = [(rank, draw(st.sampled_from([0, 0, 1]))) for rank in ranks], []
        while pairs:
            size = draw(st.integers(1, most_per_step))
            steps.append(pairs[:size])
            pairs = pairs[size:]
        paths.append(cumulative(steps))
    return paths


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("most_per_step", "per_step"), [(1, 1), (3, None)], ids=["one", "varying"])
@given(data=st.data())
def test_choice_hangs_together_and_its_prefixes_are_choices(objective, most_per_step, per_step, data):
    paths = data.draw(path_lists(most_per_step))
    chosen = select(paths, 6, per_step, objective)
    assert len(set(chosen)) == len(chosen) <= 6
    for num_nodes in range(1, len(chosen) + 1):
        assert select(paths, num_nodes, per_step, objective) == chosen[:num_nodes]
        assert all(DraftGraph(tuple(chosen[:num_nodes]), per_step).parents)


@given(paths=path_lists(1))
def test_gain_is_no_worse_than_a_chain(paths):
    def saved(chosen):
        return sum(accept_length(path, set(chosen)) for path in paths)

    chosen = select(paths, 4, 1)
    assert saved(chosen[:1]) == max(saved([node]) for node in count_formulas(paths) or [A])
    steps = [saved(chosen[:n]) for n in range(len(chosen) + 1)]
    assert all(before < after for before, after in itertools.pairwise(steps))
