"""Serve recorded generations on a machine: the rule and the averages of requests are the engine's own.

What the scheduler does around them (`engine.scheduler`) is in `_Server`: who may have drafts, what the rule is asked,
and what it is told of a step.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from benchmarks.budget.machines import Machine
from benchmarks.budget.recorded import MAX_DRAFTS, Recording
from vllm_dllm.draft.acceptance import RequestAcceptance
from vllm_dllm.draft.budget import BudgetRule

Budget = int | Literal["auto"]

NO_LIMIT = 10**6


@dataclass(frozen=True, slots=True)
class Phase:
    """So many requests, a number at once, of recordings in turn; the next phase begins when all have ended.

    Attributes:
        at_once: requests.
        num_requests: in all.
        names: of the recordings; one that begins with ! has drafts that never come true.
    """

    at_once: int
    num_requests: int
    names: tuple[str, ...]


@dataclass(slots=True)
class RecordedRequest:
    """Where a request is in its recorded blocks."""

    blocks: Sequence[Sequence[Sequence[int]]]
    is_never: bool
    block: int = 0
    anchor: int = -1  # -1: the block's first step, without drafts

    @property
    def is_done(self) -> bool:
        """Whether its last block has ended."""
        return self.block == len(self.blocks)

    def saved(self, budget: int) -> int:
        """Return how many steps the drafts of the present one save."""
        if self.anchor < 0 or self.is_never:
            return 0
        return sum(need <= budget for need in self.blocks[self.block][self.anchor])

    def go_on(self, num_steps: int) -> None:
        """Make so many transitions, or those that are left of the block."""
        self.anchor += num_steps
        if self.anchor >= len(self.blocks[self.block]):
            self.block, self.anchor = self.block + 1, -1


@dataclass(slots=True)
class _Server:
    machine: Machine
    recording: Recording  # of the graph that is served
    rule: BudgetRule
    rng: random.Random
    acceptance: RequestAcceptance = field(default_factory=RequestAcceptance)
    spent_ms: float = 0.0

    def step(self, running: dict[str, RecordedRequest]) -> None:
        """Let each running request take a step."""
        begin = [name for name, request in running.items() if request.anchor < 0]
        drafting = [name for name, request in running.items() if request.anchor >= 0]
        new = [name for name in begin if running[name].block == 0]
        is_causal, length = self.recording.is_causal, self.recording.block_length
        num_begins = len(begin) - len(new) if is_causal else 0
        budgets = dict.fromkeys(running, 0)
        if drafting:
            pays = self.acceptance.pay(drafting, self.rule.break_even)
            worth = [name for name, pay in zip(drafting, pays, strict=True) if pay]
            num_without = len(drafting) - len(worth) + len(new) * is_causal
            budgets |= dict.fromkeys(worth, self.rule.choose(len(worth), NO_LIMIT, num_begins, num_without))
        long = new if is_causal else begin
        rows = length * (len(running) + sum(budgets.values()) + num_begins) + self.machine.refresh_rows * len(long)
        ms = self.machine.ms(rows, len(running))
        self.spent_ms += ms + self.machine.host_ms
        accepted = {name: request.saved(budgets[name]) for name, request in running.items()}
        self._tell(budgets, accepted, set(begin), set(long), ms)
        for name, request in running.items():
            request.go_on(1 + accepted[name])

    def _tell(
        self, budgets: dict[str, int], accepted: dict[str, int], begin: set[str], long: set[str], ms: float
    ) -> None:
        for name, budget in budgets.items():
            self.acceptance.observe(name, accepted[name], self.rule.expected(budget), self.rule.break_even)
        commits = begin - long
        budget = max(budgets.values())
        drafting = [name for name, own in budgets.items() if own == budget and name not in commits]
        if not set(drafting) - long:
            return
        mean = sum(accepted[name] for name in drafting) / len(set(drafting) - long)
        num_without = len(budgets) - len(commits) - len(drafting)
        is_timed = not long
        late = 1 + abs(self.rng.gauss(0, self.machine.noise))
        if self.rng.random() < self.machine.accidents:
            late = self.rng.uniform(2, 10)
        took_ms, host_ms = (ms * late, self.machine.host_ms) if is_timed else (None, None)
        self.rule.observe(len(drafting), budget, mean, took_ms, host_ms, len(commits), num_without)


def spent_ms(machine: Machine, recordings: dict[str, Recording], load: Sequence[Phase], budget: Budget) -> float:
    """Return how long a load takes.

    Args:
        machine: what steps take.
        recordings: by name; the graph that is served is that of the load's first one.
        load: what is asked, in turn.
        budget: as the setting.
    """
    served = recordings[load[0].names[0].removeprefix("!")]
    rule = BudgetRule(served.prior, served.block_length, None if budget == "auto" else budget)
    rule.curve = machine.forecast or machine.curve
    server = _Server(machine, served, rule, random.Random(0))
    asked = _requests(recordings, load)
    for phase in load:
        running: dict[str, RecordedRequest] = {}
        left = phase.num_requests
        while left or running:
            while left and len(running) < phase.at_once:
                name, request = next(asked)
                running[name] = request
                left -= 1
            server.step(running)
            for name in [name for name, request in running.items() if request.is_done]:
                del running[name]
                server.acceptance.forget(name)
    return server.spent_ms


def _requests(recordings: dict[str, Recording], load: Sequence[Phase]) -> Iterator[tuple[str, RecordedRequest]]:
    number = 0
    for phase in load:
        for place in range(phase.num_requests):
            name = phase.names[place % len(phase.names)]
            prompts = recordings[name.removeprefix("!")].prompts
            yield f"{number}", RecordedRequest(prompts[number % len(prompts)], name.startswith("!"))
            number += 1


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a load came to with each budget, as speed relative to no drafts."""

    auto: float
    fixed: tuple[float, ...]  # budgets 1, 2, ...

    @property
    def best(self) -> tuple[float, int]:
        """The best number in hindsight, 0 among them."""
        return max((speed, -number) for number, speed in enumerate((1.0, *self.fixed)))

    @property
    def of_best(self) -> float:
        """Auto relative to the best number."""
        return self.auto / self.best[0]


def outcome(machine: Machine, recordings: dict[str, Recording], load: Sequence[Phase]) -> Outcome:
    """Serve a load with each budget."""
    off = spent_ms(machine, recordings, load, 0)
    auto = spent_ms(machine, recordings, load, "auto")
    fixed = (spent_ms(machine, recordings, load, number) for number in range(1, 1 + MAX_DRAFTS))
    return Outcome(off / auto, tuple(off / ms for ms in fixed))
