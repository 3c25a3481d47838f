"""How many drafts a step evaluates: as many as pay, none if none do (docs/never-slower.md).

A step of n requests and a budget of K drafts makes 1 + E(K) transitions of each request in T(n, K) ms. `BudgetRule`
takes the K with the most transitions per ms. Both are a forecast (a cost curve measured at start, what the drafter
expects) times a factor learned from the steps themselves (`Factors`), so that a wrong forecast costs a few steps.
"""

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

MARGIN = 0.03
"""A budget replaces the present one if it is better by this share; 0 replaces any that is worse than it."""
EXPLORE_EVERY = 8
"""One step of so many may try another budget..."""
EXPLORE_SHARES = (0.005, 0.0025, 0.005, 0.0025)
"""... which in turn is 0, one more, 0, one less; tries of each turn may cost this share of the time."""
DECIDE_EVERY = 4
"""Steps for which a decision holds, since deciding takes time; not for steps of other requests, nor behind the first
step of a budget. Those before the first decision have no drafts, so that it is known what a step takes without."""
SETTLED = 8
"""Observations after which a change of a budget's time says that the load changed."""


@dataclass(frozen=True)
class CostCurve:
    """Milliseconds of a step by its number of rows: linear between measured points and beyond the last two.

    Args:
        points: (rows, ms) by ascending rows, at least one; a point that is cheaper than one before it is raised to it.
        num_captured: so many first points are those of all captured CUDA graphs; a step is padded to the next of them
            and takes its time.
    """

    points: tuple[tuple[int, float], ...]
    num_captured: int = 0

    def __post_init__(self) -> None:
        rows, ms = zip(*self.points, strict=True)
        if list(rows) != sorted(set(rows)) or not all(0 < m < math.inf for m in ms):
            raise ValueError(f"a cost curve needs ascending rows and positive times, got {self.points}")
        raised = [max(ms[: i + 1]) for i in range(len(ms))]
        object.__setattr__(self, "points", tuple(zip(rows, raised, strict=True)))

    def ms(self, rows: int) -> float:
        """Return the time of a step of so many rows; below the first point that of the first point."""
        if rows <= self.points[0][0] or len(self.points) == 1:
            return self.points[0][1]
        after = min(bisect_left(self.points, (rows, 0.0)), len(self.points) - 1)
        if after < self.num_captured and rows <= self.points[after][0]:
            return self.points[after][1]
        (rows_0, ms_0), (rows_1, ms_1) = self.points[after - 1], self.points[after]
        return ms_0 + (ms_1 - ms_0) * (rows - rows_0) / (rows_1 - rows_0)


@dataclass
class Factors:
    """What a forecast is to be multiplied by, for each budget; learned from observed / forecast.

    Attributes:
        rate: weight of an observation once there are many; the i-th has 1 / (i + trust), if that is more.
        trust: observations that the forecast itself is worth.
        most: an observation counts as at most so many times what was expected, since steps are late by accident but
            never early; one that many times below it shows that what was known was such an accident.
    """

    rate: float
    trust: int = 0
    most: float = math.inf
    known: dict[int, float] = field(default_factory=dict)
    num_seen: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))
    nearest: dict[int, int] = field(default_factory=dict)  # to those that are not known

    def of(self, budget: int) -> float:
        """Return the factor of a budget; one that was never observed has that of its nearest neighbour."""
        if budget in self.known or not self.known:
            return self.known.get(budget, 1.0)
        if budget not in self.nearest:
            self.nearest[budget] = min(self.known, key=lambda other: (abs(other - budget), other))
        return self.known[self.nearest[budget]]

    def observe(self, budget: int, ratio: float, is_usual: bool, num: int = 1) -> None:
        """Learn from one step.

        Args:
            budget: of the step.
            ratio: what was observed / what was forecast, without factor.
            is_usual: no try. What a usual budget's factor moves by, all move by: the load changed, not the budget.
            num: observations of which the ratio is the mean.
        """
        old = self.of(budget)
        if budget not in self.known:
            self.nearest.clear()
        self.num_seen[budget] += num
        is_accident = ratio * self.most < old
        weight = max(0.5 if is_accident else self.rate, num / (self.num_seen[budget] + self.trust))
        expected = min(ratio, self.most * old) if self.known else ratio
        self.known[budget] = max(old + weight * (expected - old), 1e-3)
        if is_usual and self.num_seen[budget] > SETTLED:
            for other in self.known.keys() - {budget}:
                self.known[other] *= self.known[budget] / old


@dataclass
class _Batch:
    """What is known of steps of about the same number of requests; they share the bit length of num_reqs - 1.

    Attributes:
        cost: of their times.
        budget: of the latest step, but for tries.
        decided: budgets and where they break even, since the last turn, by what a step had; a step of other requests
            asks for other budgets.
        used: budgets that any step had.
        num_steps: so far.
        served_ms, spent_ms: what tries are paid from, and what each kind of them has cost.
    """

    cost: Factors = field(default_factory=lambda: Factors(rate=0.2, most=2.0))
    budget: int = 0
    decided: dict[tuple[int, ...], tuple[int, float]] = field(default_factory=dict)
    used: set[int] = field(default_factory=set)
    num_steps: int = 0
    served_ms: float = 0.0
    spent_ms: list[float] = field(default_factory=lambda: [0.0] * 4)


class BudgetRule:
    """Chooses the budget of each step; deterministic in what it is told.

    Args:
        prior: transitions that drafts are expected to save, by budget (`draft.drafter.Drafter.prior`).
        block_length: rows of one canvas.
        fixed: a budget that overrides the rule.

    Attributes:
        break_even: share of the transitions expected of the present budget at which its drafts pay for their rows, 0 to
            1; 0 where it is 0 or fixed.
    """

    def __init__(self, prior: Sequence[float], block_length: int, fixed: int | None = None) -> None:
        self.fixed = fixed
        self.curve: CostCurve | None = None
        self._block_length = block_length
        self.break_even = 0.0
        self._prior = prior
        self._accepted = Factors(rate=0.01, trust=20)
        self._host_ms = 0.0
        self._batches: defaultdict[int, _Batch] = defaultdict(_Batch)

    def choose(
        self, num_reqs: int, limit: int, num_begins: int = 0, num_without: int = 0, canvas_rows: int | None = None
    ) -> int:
        """Return the budget of the next step.

        Args:
            num_reqs: requests that may have drafts in the step, at least 1.
            limit: the largest budget for which there is room.
            num_begins: requests besides, which begin a block: two canvases each, no drafts.
            num_without: others without drafts: one canvas each.
            canvas_rows: rows of one canvas of each that may have drafts, all together; None: those of blocks.
        """
        limit = min(limit, len(self._prior) - 1)
        if self.fixed is not None:
            return max(0, min(self.fixed, limit))
        others = num_begins + num_without
        batch = self._batch(num_reqs + others)
        batch.num_steps += 1
        if limit <= 0 or self.curve is None:
            return 0
        step = (num_reqs, num_begins, num_without, limit, canvas_rows or 0)
        is_turn = batch.num_steps % DECIDE_EVERY == 0
        if batch.num_steps < DECIDE_EVERY:
            return 0
        if is_turn:
            batch.decided.clear()
        elif step in batch.decided:
            batch.budget, self.break_even = batch.decided[step]
            return batch.budget
        drafting = num_reqs * self._block_length if canvas_rows is None else canvas_rows
        beside = self._rows(0, 0, num_begins, num_without)
        rows = [drafting * (1 + budget) + beside for budget in range(limit + 1)]
        ms = [self._host_ms + self.curve.ms(rows[budget]) * batch.cost.of(budget) for budget in range(limit + 1)]
        rates = [(others + num_reqs * (1 + self.expected(budget))) / ms[budget] for budget in range(limit + 1)]
        best, present = rates.index(max(rates)), min(batch.budget, limit)
        if rates[best] >= (1 + MARGIN) * rates[present]:
            present = best
        batch.budget = present if rates[present] >= rates[0] else 0
        self.break_even = 0.0
        if batch.budget > 0:
            extra_ms = ms[batch.budget] - ms[0]
            self.break_even = max(0.0, rates[batch.budget] * extra_ms / (num_reqs * self.expected(batch.budget)))
        batch.decided[step] = batch.budget, self.break_even
        return self._tried(batch, ms, rates) if is_turn else batch.budget

    def observe(
        self,
        num_reqs: int,
        budget: int,
        mean_accepted: float,
        ms: float | None = None,
        host_ms: float | None = None,
        num_begins: int = 0,
        num_without: int = 0,
    ) -> None:
        """Learn from a step.

        Args:
            num_reqs, budget, num_begins, num_without: of the step, as in `choose`.
            mean_accepted: transitions made through drafts, mean of the `num_reqs` requests.
            ms: what the step took; None for one that did something besides denoising, such as a refresh.
            host_ms: what passed between the step before and this one; None if the engine may have waited for work.
        """
        if self.fixed is not None:
            return
        batch = self._batch(num_reqs + num_begins + num_without)
        is_usual = budget == batch.budget
        if budget not in batch.used:  # whatever was forecast, it is not kept up to the next turn unseen
            batch.used.add(budget)
            batch.decided.clear()
        if budget > 0:
            self._accepted.observe(budget, mean_accepted / self._prior[budget], is_usual, num_reqs)
        if ms is not None and self.curve is not None:
            forecast = self.curve.ms(self._rows(num_reqs, budget, num_begins, num_without))
            batch.cost.observe(budget, ms / forecast, is_usual)
        if host_ms is not None:
            self._host_ms += 0.1 * (min(host_ms, 2 * self._host_ms or host_ms) - self._host_ms)

    def _batch(self, num_reqs: int) -> _Batch:
        return self._batches[(num_reqs - 1).bit_length()]

    def expected(self, budget: int) -> float:
        """Return how many transitions the drafts of a budget are expected to save a request."""
        return self._prior[budget] * self._accepted.of(budget)

    def _rows(self, num_reqs: int, budget: int, num_begins: int, num_without: int) -> int:
        return self._block_length * (num_reqs * (1 + budget) + 2 * num_begins + num_without)

    def _tried(self, batch: _Batch, ms: list[float], rates: list[float]) -> int:
        """Return the batch's budget, or now and then one more, none or one less, when the time that costs is earned."""
        batch.served_ms += DECIDE_EVERY * ms[batch.budget]
        turn, rest = divmod(batch.num_steps, EXPLORE_EVERY)
        turn %= 4
        budget = (0, batch.budget + 1, 0, batch.budget - 1)[turn]
        if rest or budget == batch.budget or not 0 <= budget < len(ms):
            return batch.budget
        lost_ms = ms[budget] * (1 - rates[budget] / rates[batch.budget])
        if batch.spent_ms[turn] + lost_ms > EXPLORE_SHARES[turn] * batch.served_ms:
            return batch.budget
        batch.spent_ms[turn] += max(lost_ms, 0.0)
        return budget
