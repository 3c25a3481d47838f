"""The rule that chooses how many drafts a step evaluates: its forecasts, what it learns, and that it never loses."""

import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_dllm.draft.budget import DECIDE_EVERY, EXPLORE_EVERY, EXPLORE_SHARES, BudgetRule, CostCurve, Factors
from vllm_dllm.draft.calibrated import GraphDrafter
from vllm_dllm.draft.graph import DraftGraph

B = 32
ROWS = tuple(B * 2**i for i in range(9))


def test_a_draft_with_neighbours_costs_their_rows() -> None:
    """Drafts that pay with a block's rows do not with eight times as many."""
    chosen = {}
    for canvas_rows in (None, B, 8 * B):
        rule = BudgetRule(GraphDrafter(chain(4)).prior(), B)
        rule.curve = curve(lambda rows: 10.0 + 0.05 * rows)
        chosen[canvas_rows] = [rule.choose(1, 4, canvas_rows=canvas_rows) for _ in range(DECIDE_EVERY)][-1]
    assert chosen[None] == chosen[B] > chosen[8 * B] == 0


def chain(num_nodes: int, counts: tuple[int, ...] | None = None, num_anchors: int = 0) -> DraftGraph:
    return replace(DraftGraph.chain(num_nodes), tokens_per_step=1, counts=counts, num_anchors=num_anchors)


def curve(ms: Callable[[int], float]) -> CostCurve:
    return CostCurve(tuple((rows, ms(rows)) for rows in ROWS))


def flat(rows: int) -> float:
    return 10.0 + 0.001 * rows


def linear(rows: int) -> float:
    return 10.0 * rows / B


@dataclass(frozen=True)
class Machine:
    """What is true: the time of a step, and the chance of each further draft of a chain to be right."""

    ms: Callable[[int], float]
    chances: list[float]
    noise: float = 0.05
    outliers: float = 0.01
    host_ms: float = 0.2

    def run(self, rule: BudgetRule, num_steps: int, num_reqs: int = 1, seed: int = 0) -> tuple[float, list[int]]:
        """Return the speed relative to no drafts at all, and the budgets."""
        rng = random.Random(seed)
        budgets, spent_ms, spent_without_ms = [], 0.0, 0.0
        for _ in range(num_steps):
            budget = rule.choose(num_reqs, 64)
            accepted = sum(self._accepted(rng, budget) for _ in range(num_reqs)) / num_reqs
            ms = self.ms(num_reqs * B * (1 + budget))
            spent_ms += ms + self.host_ms
            spent_without_ms += (1 + accepted) * (self.ms(num_reqs * B) + self.host_ms)
            late = rng.uniform(2, 10) if rng.random() < self.outliers else 1 + abs(rng.gauss(0, self.noise))
            rule.observe(num_reqs, budget, accepted, ms * late, self.host_ms)
            budgets.append(budget)
        return spent_without_ms / spent_ms, budgets

    def _accepted(self, rng: random.Random, budget: int) -> int:
        accepted = 0
        while accepted < min(budget, len(self.chances)) and rng.random() < self.chances[accepted]:
            accepted += 1
        return accepted


def rule_of(graph: DraftGraph, ms: Callable[[int], float]) -> BudgetRule:
    rule = BudgetRule(GraphDrafter(graph).prior(), B)
    rule.curve = curve(ms)
    return rule


def usual(budgets: list[int]) -> int:
    return Counter(budgets).most_common(1)[0][0]


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 10_000), st.floats(0.01, 1e4)), min_size=1, unique_by=lambda p: p[0]),
    st.lists(st.integers(1, 20_000), min_size=2),
    st.integers(0, 5),
)
def test_the_curve_never_falls(points: list[tuple[int, float]], rows: list[int], num_captured: int) -> None:
    cost = CostCurve(tuple(sorted(points)), min(num_captured, len(points)))
    times = [cost.ms(number) for number in sorted(rows)]
    assert all(a <= b * (1 + 1e-9) for a, b in pairwise(times))


def test_the_curve_passes_its_points_and_goes_on_as_a_line() -> None:
    cost = CostCurve(((32, 1.0), (64, 3.0), (128, 2.0), (256, 7.0)))
    assert [cost.ms(rows) for rows in (1, 32, 48, 64, 128, 192, 256, 384)] == [1, 1, 2, 3, 3, 5, 7, 11]


def test_the_curve_is_a_staircase_up_to_the_largest_captured_graph() -> None:
    cost = CostCurve(((32, 1.0), (64, 3.0), (128, 2.0), (256, 7.0)), num_captured=3)
    assert [cost.ms(rows) for rows in (1, 32, 33, 64, 65, 128, 192, 256, 384)] == [1, 1, 3, 3, 3, 3, 5, 7, 11]
    alone = CostCurve(((32, 1.0), (64, 3.0), (128, 4.0)), num_captured=3)
    assert [alone.ms(rows) for rows in (96, 128, 192)] == [4, 4, 5]


def test_a_draft_that_fills_what_pads_the_graph_is_taken() -> None:
    """A canvas more is free where the graph has it anyway, and costs more than it brings where it begins another."""
    priors = [0.0, 0.3, 0.6, 0.61, 0.62]
    for captured, budget in ((((32, 1.0), (96, 1.4), (160, 3.0)), 2), (((32, 1.0), (128, 1.4), (160, 3.0)), 3)):
        rule = BudgetRule(priors, 32)
        rule.curve = CostCurve(captured, len(captured))
        assert [rule.choose(1, 4) for _ in range(DECIDE_EVERY)][-1] == budget


@pytest.mark.parametrize("points", [((64, 1.0), (32, 2.0)), ((32, 1.0), (32, 2.0)), ((32, 0.0),), ((32, math.nan),)])
def test_a_curve_that_is_none_is_refused(points: tuple[tuple[int, float], ...]) -> None:
    with pytest.raises(ValueError, match="ascending rows and positive times"):
        CostCurve(points)


def test_prior_of_counts_is_the_share_of_anchors() -> None:
    assert GraphDrafter(chain(3, (80, 50, 20), 100)).prior() == pytest.approx([0, 0.8, 1.3, 1.5])


def test_prior_without_counts_falls_with_depth_and_with_every_sibling() -> None:
    graph = DraftGraph((((0, 0),), ((0, 0), (1, 0)), ((1, 0),)), 1)
    assert GraphDrafter(graph).prior() == pytest.approx([0, 0.6, 0.6 + 0.36, 0.6 + 0.36 + 0.6 * 0.3])


def test_a_look_ahead_takes_the_place_of_two_nodes() -> None:
    graph = chain(5, (80, 50, 20, 10, 5), 100)
    assert GraphDrafter(graph, 4).prior() == pytest.approx([0, 0.8, 1.3, 1.5, 0.8 + 0.5 + 0.2, 0.8 + 0.5 + 0.2 + 0.2])


def test_a_budget_grows_up_to_where_steps_look_ahead() -> None:
    """Two drafts less are no hindrance."""
    rule = BudgetRule(GraphDrafter(chain(8), 5).prior(), B)
    rule.curve = curve(flat)
    _, budgets = Machine(flat, [0.8] * 8).run(rule, 400)
    assert usual(budgets[200:]) >= 5


def test_a_node_that_was_never_right_still_has_an_expectation_to_correct() -> None:
    assert GraphDrafter(chain(2, (0, 0), 50)).prior() == [0, 0.01, 0.01]


def test_memory_bound_steps_take_all_drafts() -> None:
    speed, budgets = Machine(flat, [0.8] * 8).run(rule_of(chain(8), flat), 400)
    assert usual(budgets[200:]) >= 7
    assert speed > 2


def test_compute_bound_steps_take_none() -> None:
    speed, budgets = Machine(linear, [0.8] * 8).run(rule_of(chain(8), linear), 1000)
    assert usual(budgets) == 0
    assert speed > 0.99


def test_more_requests_leave_less_for_drafts() -> None:
    def roof(rows: int) -> float:
        return 10 + 0.3 * max(0, rows - 256)

    usually = [
        usual(Machine(roof, [0.7] * 8).run(rule_of(chain(8), roof), 500, num_reqs)[1]) for num_reqs in (1, 4, 16)
    ]
    assert usually[0] >= 6
    assert usually[0] > usually[1] > usually[2] == 0


def test_begins_without_drafts_and_has_none_without_a_curve() -> None:
    rule = BudgetRule(GraphDrafter(chain(4)).prior(), B)
    assert {rule.choose(1, 4) for _ in range(50)} == {0}
    rule.curve = curve(flat)
    assert max(rule.choose(1, 4) for _ in range(DECIDE_EVERY)) > 0
    assert [rule.choose(2, 4) > 0 for _ in range(DECIDE_EVERY)] == [False] * (DECIDE_EVERY - 1) + [True]


def test_a_curve_that_promises_too_much_is_corrected() -> None:
    _, budgets = Machine(linear, [0.5] * 8).run(rule_of(chain(8), flat), 200)
    assert max(budgets) == 8
    assert usual(budgets[100:]) == 0


def test_a_curve_that_promises_too_little_is_corrected() -> None:
    _, budgets = Machine(flat, [0.8] * 8).run(rule_of(chain(8), linear), 4000)
    assert usual(budgets[:50]) == 0
    assert usual(budgets[3000:]) >= 5


@pytest.mark.parametrize(("promised", "true", "expected"), [(0.95, 0.02, {0}), (0.3, 0.9, {5, 6, 7, 8})])
def test_a_wrong_prior_is_corrected(promised: float, true: float, expected: set[int]) -> None:
    def ms(rows: int) -> float:
        return 10 + 0.03 * rows

    graph = chain(8, tuple(int(1000 * promised**depth) for depth in range(1, 9)), 1000)
    _, budgets = Machine(ms, [true] * 8).run(rule_of(graph, ms), 6000)
    assert usual(budgets[5000:]) in expected


def test_exploration_stays_in_its_share() -> None:
    """Where drafts never help, all that is lost is lost by trying them."""
    speed, budgets = Machine(linear, [0.0] * 8, noise=0.0, outliers=0.0).run(rule_of(chain(8), linear), 5000)
    tries = [index for index, budget in enumerate(budgets, 1) if budget > 0]
    assert tries
    assert all(index % EXPLORE_EVERY == 0 for index in tries)
    assert speed > 1 - 2 * EXPLORE_SHARES[1]  # the share is of what it expects to lose
    assert sum(EXPLORE_SHARES) <= 0.02


def test_a_step_of_other_requests_is_decided_anew() -> None:
    """What fills a graph with one request's drafts begins another with two's."""
    rule = BudgetRule([0.0, 0.5, 0.9, 1.2, 1.4, 1.5], 32)
    rule.curve = CostCurve(((192, 1.0), (384, 3.0)), num_captured=2)
    alone = [rule.choose(1, 5, num_without=1) for _ in range(DECIDE_EVERY)][-1]
    assert [alone, rule.choose(2, 5), rule.choose(1, 5, num_without=1)] == [4, 2, 4]


def test_where_a_budget_breaks_even_is_that_of_its_step() -> None:
    rule = BudgetRule([0.0, 0.5, 0.9, 1.2, 1.4, 1.5], 32)
    rule.curve = CostCurve(((32, 1.0), (384, 2.0)), num_captured=0)
    alone = [(rule.choose(1, 5, num_without=1), rule.break_even) for _ in range(DECIDE_EVERY)][-1]
    both = rule.choose(2, 5), rule.break_even
    assert alone != both
    assert (rule.choose(1, 5, num_without=1), rule.break_even) == alone


def test_a_budget_that_disappoints_is_left_after_one_step() -> None:
    rule, budgets = rule_of(chain(8), flat), []
    for _ in range(DECIDE_EVERY + 1):
        budgets.append(rule.choose(1, 8))
        rule.observe(1, budgets[-1], 1.0, linear(B * (1 + budgets[-1])))
    assert budgets[-2] == 8
    assert budgets[-1] < 8


def test_a_mean_of_many_requests_teaches_as_much_as_they_would_in_turn() -> None:
    one, many = Factors(rate=0.01, trust=20), Factors(rate=0.01, trust=20)
    for _ in range(16):
        one.observe(3, 0.0, is_usual=True)
    many.observe(3, 0.0, is_usual=True, num=16)
    assert many.of(3) == pytest.approx(one.of(3)) == pytest.approx(20 / 36)


def test_small_gains_do_not_make_it_flip() -> None:
    """At a gain below the margin it stays with what it has."""

    def ms(rows: int) -> float:
        return 10.0 if rows <= B else 14.85

    _, budgets = Machine(ms, [0.5], noise=0.0, outliers=0.0).run(rule_of(chain(1, (50,), 100), ms), 1000)
    changes = sum(a != b for a, b in pairwise(budgets))
    assert changes <= 2 * 1000 / EXPLORE_EVERY


def test_limit_is_kept() -> None:
    rule = rule_of(chain(8), flat)
    for step in range(300):
        limit = step % 9
        budget = rule.choose(1, limit)
        assert 0 <= budget <= limit
        rule.observe(1, budget, float(budget), flat(B * (1 + budget)))


def test_fixed_budget_overrides_the_rule() -> None:
    rule = BudgetRule(GraphDrafter(chain(8)).prior(), B, fixed=3)
    assert [rule.choose(1, limit) for limit in (8, 3, 2, 0)] == [3, 3, 2, 0]
    rule.curve = curve(linear)
    rule.observe(1, 3, 0.0, 1e6)
    assert rule.choose(1, 8) == 3


def test_same_observations_same_budgets() -> None:
    runs = [Machine(flat, [0.5] * 8).run(rule_of(chain(8), linear), 500, num_reqs=2, seed=3)[1] for _ in range(2)]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("seed", range(40))
def test_never_slower(seed: int) -> None:
    """Random machines, forecasts that are wrong in level and shape, noisy times with outliers."""
    rng = random.Random(seed)
    floor, slope, knee = rng.uniform(1, 20), rng.choice([0.001, 0.01, 0.03, 0.1]), rng.choice([0, 64, 256, 1024])
    level, shape = rng.uniform(0.3, 3), rng.choice([0, 1, 1, 1, 10])
    num_nodes = rng.choice([1, 3, 5, 8, 10])
    chance, decay = rng.uniform(0.05, 0.95), rng.uniform(0.1, 0.9)
    counts = tuple(int(1000 * decay**depth) for depth in range(1, num_nodes + 1))
    graph = chain(num_nodes) if rng.random() < 0.5 else chain(num_nodes, counts, 1000)
    rule = rule_of(graph, lambda rows: level * floor + shape * slope * max(0, rows - knee))
    machine = Machine(
        lambda rows: floor + slope * max(0, rows - knee),
        [chance * rng.uniform(0.6, 1) for _ in range(num_nodes)],
        noise=rng.choice([0.02, 0.1, 0.2]),
        host_ms=rng.choice([0.2, 1.0, 5.0]),
    )
    speed, _ = machine.run(rule, 4000, rng.choice([1, 2, 4, 16]), seed)
    assert speed >= 0.98
