"""What a step did, from the scheduler to the metrics of the front end; what a request took, to its output.

vLLM sends the front end `SchedulerStats` at each step. Its part for speculative decoding has a list of counts per draft
position, which vLLM leaves unused with diffusion models: there `StepStats` travels, as plain whole numbers. None of its
fields is made for a plugin's numbers: those for connectors' statistics end vLLM's own loggers where no connector
is, and fields that its classes do not have are dropped on the way. `check_way` sends a known pattern when a scheduler
starts.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder
from vllm.v1.spec_decode.metrics import SpecDecodingLogging, SpecDecodingStats

from vllm_dllm.engine.report import MAX_DEPTH, RequestReport
from vllm_dllm.errors import UnsupportedVllmError

MARK = -1_819_045_988
"""Comes first: no count of vLLM's is negative."""

_NUM_NUMBERS = 6 + 2 * MAX_DEPTH
_WAY = "The way of the scheduler's statistics in the installed vLLM"
_ALLOWED = "install vLLM 0.32 or 0.33"


@dataclass(slots=True)
class StepStats:
    """Sums over the requests of a step, or of several.

    Attributes:
        budgets: steps by the budget they had.
        forwards, refreshes: requests that took part.
        unmasked: positions.
        blocks: emitted.
        proposed: drafts that were evaluated, by depth 1..MAX_DEPTH in the graph.
        accepted: drafts that came true, by the steps 1..MAX_DEPTH that they were ahead.
    """

    budgets: dict[int, int] = field(default_factory=dict)
    forwards: int = 0
    refreshes: int = 0
    unmasked: int = 0
    blocks: int = 0
    proposed: list[int] = field(default_factory=lambda: [0] * MAX_DEPTH)
    accepted: list[int] = field(default_factory=lambda: [0] * MAX_DEPTH)

    @classmethod
    def of_step(cls, budget: int, reports: Collection[RequestReport]) -> "StepStats":
        """Sum the reports of a step's requests."""
        walks = [report.accepted for report in reports]
        accepted = [0] * MAX_DEPTH
        for depth in range(1, max(walks, default=0) + 1):
            accepted[min(depth, MAX_DEPTH) - 1] += sum(walk >= depth for walk in walks)
        return cls(
            budgets={budget: 1},
            forwards=sum(report.forwards for report in reports),
            refreshes=sum(report.refreshes for report in reports),
            unmasked=sum(report.unmasked for report in reports),
            blocks=sum(report.finished for report in reports),
            proposed=[sum(column) for column in zip([0] * MAX_DEPTH, *(r.proposed for r in reports), strict=True)],
            accepted=accepted,
        )

    @property
    def total_accepted(self) -> int:
        """Transitions made through drafts."""
        return sum(self.accepted)

    @property
    def nfe(self) -> int:
        """Forwards, refreshes included."""
        return self.forwards + self.refreshes

    def add(self, other: "StepStats") -> None:
        """Add the sums of other steps."""
        for budget, num_steps in other.budgets.items():
            self.budgets[budget] = self.budgets.get(budget, 0) + num_steps
        self.forwards += other.forwards
        self.refreshes += other.refreshes
        self.unmasked += other.unmasked
        self.blocks += other.blocks
        self.proposed = [a + b for a, b in zip(self.proposed, other.proposed, strict=True)]
        self.accepted = [a + b for a, b in zip(self.accepted, other.accepted, strict=True)]

    def put(self, into: SpecDecodingStats) -> None:
        """Send the numbers of one step along."""
        (budget,) = self.budgets
        counts = [budget, self.forwards, self.refreshes, self.unmasked, self.blocks]
        into.num_accepted_tokens_per_pos = [MARK, *counts, *self.proposed, *self.accepted]

    @classmethod
    def take(cls, stats: SchedulerStats | None) -> "StepStats | None":
        """Read what `put` sent; None for a step that has no report.

        Raises: UnsupportedVllmError where that is not what arrived.
        """
        numbers = stats.spec_decoding_stats.num_accepted_tokens_per_pos if stats and stats.spec_decoding_stats else None
        if not numbers:
            return None
        if numbers[0] != MARK or len(numbers) != _NUM_NUMBERS:
            raise UnsupportedVllmError(f"{_WAY} changed a step's numbers to {numbers}; {_ALLOWED}")
        _, budget, forwards, refreshes, unmasked, blocks, *depths = numbers
        return cls({budget: 1}, forwards, refreshes, unmasked, blocks, depths[:MAX_DEPTH], depths[MAX_DEPTH:])


@dataclass(slots=True)
class RequestTotals:
    """What a request took so far, over all its preemptions."""

    forwards: int = 0
    refreshes: int = 0
    proposed: int = 0
    accepted: int = 0

    def add(self, report: RequestReport) -> None:
        """Add a step."""
        self.forwards += report.forwards
        self.refreshes += report.refreshes
        self.accepted += report.accepted
        self.proposed += sum(report.proposed)

    def as_output(self, exactness: str | None) -> dict[str, Any]:
        """Return what a request's output shows as `kv_transfer_params`.

        Args:
            exactness: of speculation, None without.
        """
        return {
            "dllm": {
                "exactness": exactness,
                "nfe": self.forwards + self.refreshes,
                "nfe_refresh": self.refreshes,
                "proposed": self.proposed,
                "accepted": self.accepted,
            }
        }


def check_way() -> None:
    """Send a known pattern as an engine sends a front end what a step and a request took.

    Raises: UnsupportedVllmError where something else arrives.
    """
    step = StepStats({7: 1}, 1, 2, 3, 4, list(range(5, 5 + MAX_DEPTH)), list(range(5 + MAX_DEPTH, 5 + 2 * MAX_DEPTH)))
    stats, took = SpecDecodingStats(1), RequestTotals(1, 2, 3, 4).as_output("exact")
    step.put(stats)
    sent = EngineCoreOutputs(
        outputs=[EngineCoreOutput("a", [1], kv_transfer_params=took)],
        scheduler_stats=SchedulerStats(spec_decoding_stats=stats),
    )
    received = MsgpackDecoder(EngineCoreOutputs).decode(MsgpackEncoder().encode(sent))
    try:
        arrived = StepStats.take(received.scheduler_stats), received.outputs[0].kv_transfer_params
        own = SpecDecodingLogging(is_diffusion=True)
        own.observe(received.scheduler_stats.spec_decoding_stats)
        own.log(lambda *args: None)
    except (AttributeError, TypeError, LookupError, ValueError) as error:
        raise UnsupportedVllmError(f"{_WAY} is another than vllm-dllm knows ({error}); {_ALLOWED}") from error
    if arrived != (step, took):
        raise UnsupportedVllmError(f"{_WAY} delivered {arrived} for {(step, took)}; {_ALLOWED}")
