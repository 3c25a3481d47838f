"""Whose drafts are worth their rows, on simulated machines with requests of different acceptance."""

import random
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest

from tests.draft.test_budget import B, chain, flat, rule_of
from vllm_dllm.draft.acceptance import FIRST_WAIT, LONGEST_WAIT, RequestAcceptance
from vllm_dllm.draft.budget import BudgetRule
from vllm_dllm.draft.calibrated import GraphDrafter

GOOD, BAD = 0.8, 0.02


def bound(rows: int) -> float:
    """Return what a step takes where each row costs."""
    return 10 + 0.03 * rows


def steep(rows: int) -> float:
    return 5 + 0.06 * rows


def run(
    rule: BudgetRule, ms: Callable[[int], float], chances: Sequence[float], seed: int = 0, *, is_own: bool = True
) -> tuple[float, list[float]]:
    """Decode 1,500 steps of some requests; returns the speed relative to no drafts, and mean drafts of each.

    Args:
        rule: of the budget.
        ms: what a step of so many rows takes.
        chances: of each request's next draft to be right.
        seed: of accidents.
        is_own: whether requests may have other budgets than the batch's.
    """
    rng, acceptance, names = random.Random(seed), RequestAcceptance(), [f"{i}" for i in range(len(chances))]
    spent_ms, num_transitions, drafts = 0.0, 0, [0] * len(chances)
    for _ in range(1500):
        pays = acceptance.pay(names, rule.break_even) if is_own else [True] * len(names)
        num_reqs, num_without = sum(pays), len(pays) - sum(pays)
        chosen = rule.choose(num_reqs, 64, 0, num_without)
        budgets = [chosen * pay for pay in pays]
        accepted = [accept(rng, budget, chance) for budget, chance in zip(budgets, chances, strict=True)]
        took_ms = ms(B * sum(1 + budget for budget in budgets)) * (1 + abs(rng.gauss(0, 0.05)))
        spent_ms += took_ms
        num_transitions += len(names) + sum(accepted)
        drafts = [total + budget for total, budget in zip(drafts, budgets, strict=True)]
        for name, budget, number in zip(names, budgets, accepted, strict=True):
            acceptance.observe(name, number, rule.expected(budget), rule.break_even)
        rule.observe(num_reqs, max(budgets), sum(accepted) / num_reqs, took_ms, 0.2, 0, num_without)
    without_ms = 1.04 * ms(B * len(names)) * num_transitions / len(names)
    return without_ms / spent_ms, [total / 1500 for total in drafts]


def accept(rng: random.Random, budget: int, chance: float) -> int:
    accepted = 0
    while accepted < budget and rng.random() < chance:
        accepted += 1
    return accepted


@pytest.mark.parametrize(
    ("ms", "chances", "gain"),
    [
        (bound, [GOOD] * 2 + [BAD] * 2, 1.15),
        (bound, [GOOD] + [BAD] * 3, 1.15),
        (flat, [GOOD] * 8 + [BAD] * 8, 1.08),
    ],
)
def test_who_drafts_badly_takes_nothing_from_the_others(
    ms: Callable[[int], float], chances: list[float], gain: float
) -> None:
    together, _ = run(rule_of(chain(8), ms), ms, chances, is_own=False)
    apart, drafts = run(rule_of(chain(8), ms), ms, chances)
    good, bad = ([num for num, c in zip(drafts, chances, strict=True) if c == which] for which in (GOOD, BAD))
    assert apart > gain * together
    assert min(good) > 4 * max(bad) > 0


@pytest.mark.parametrize("chances", [[GOOD] * 4, [0.5] * 8, [BAD] * 4, [GOOD], [BAD]])
@pytest.mark.parametrize("ms", [flat, bound, steep])
def test_requests_alike_are_served_as_by_the_batch_s_budget(ms: Callable[[int], float], chances: list[float]) -> None:
    together, _ = run(rule_of(chain(8), ms), ms, chances, is_own=False)
    apart, _ = run(rule_of(chain(8), ms), ms, chances)
    assert apart > 0.98 * together
    assert apart > 0.97


def test_free_drafts_are_everyone_s() -> None:
    """Where they cost next to nothing even poor ones pay."""
    _, drafts = run(rule_of(chain(8), lambda rows: 10 + 1e-6 * rows), lambda rows: 10.0, [GOOD, GOOD, 0.3])
    assert min(drafts) > 6


def test_a_fixed_budget_has_no_share_to_reach() -> None:
    rule = BudgetRule(GraphDrafter(chain(8)).prior(), B, fixed=3)
    assert run(rule, bound, [GOOD, BAD])[1] == [3, 3]


def test_probes_become_rare_until_one_comes_true() -> None:
    acceptance, probes = RequestAcceptance(), []
    for step in range(2000):
        pays, _ = acceptance.pay(["a", "b"], 0.9)
        acceptance.observe("a", 0, float(pays), 0.9)
        if pays and step > 10:
            probes.append(step)
    gaps = [b - a - 1 for a, b in pairwise(probes)]
    assert gaps[:4] == [2 * FIRST_WAIT, 4 * FIRST_WAIT, 8 * FIRST_WAIT, LONGEST_WAIT]
    assert set(gaps[3:]) == {LONGEST_WAIT}
    while not acceptance.pay(["a", "b"], 0.9)[0]:
        acceptance.observe("a", 0, 0.0, 0.9)
    acceptance.observe("a", 20, 1.0, 0.9)
    assert acceptance.pay(["a", "b"], 0.9) == [True, True]


def test_same_reports_same_drafts() -> None:
    runs = [run(rule_of(chain(8), bound), bound, [GOOD, 0.5, BAD], seed=3) for _ in range(2)]
    assert runs[0] == runs[1]
