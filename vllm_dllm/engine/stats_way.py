"""A step's numbers from the scheduler to the metrics of every front end.

vLLM sends front ends `SchedulerStats` at each step. Its part for speculative decoding has a list of counts per draft
position, which vLLM leaves unused with diffusion models: there `StepStats` travels, as plain whole numbers. None of its
fields is made for a plugin's numbers: those for connectors' statistics end vLLM's own loggers where no connector is,
and fields that its classes do not have are dropped on the way. `check_way` sends a known pattern when a scheduler
starts.
"""

from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder
from vllm.v1.spec_decode.metrics import SpecDecodingLogging, SpecDecodingStats

from vllm_dllm.engine.telemetry import NUM_NUMBERS, RequestTotals, StepStats
from vllm_dllm.errors import INSTALL_SUPPORTED, UnsupportedVllmError
from vllm_dllm.state.report import MAX_DEPTH

MARK = -1_819_045_988
"""Comes first: no count of vLLM's is negative."""

_WAY = "The way of the scheduler's statistics in the installed vLLM"


def put(step: StepStats, into: SpecDecodingStats) -> None:
    """Send the numbers of one step along."""
    into.num_accepted_tokens_per_pos = [MARK, *step.numbers()]


def take(stats: SchedulerStats | None) -> StepStats | None:
    """Read what `put` sent; None for a step that has no report.

    Raises: UnsupportedVllmError where that is not what arrived.
    """
    spec_decoding = None if stats is None else stats.spec_decoding_stats
    numbers = None if spec_decoding is None else spec_decoding.num_accepted_tokens_per_pos
    if not numbers:
        return None
    if numbers[0] != MARK or len(numbers) != 1 + NUM_NUMBERS:
        raise UnsupportedVllmError(f"{_WAY} changed a step's numbers to {numbers}; {INSTALL_SUPPORTED}")
    return StepStats.of_numbers(numbers[1:])


def check_way() -> None:
    """Send a known pattern as an engine sends a front end what a step and a request took.

    Raises: UnsupportedVllmError where something else arrives.
    """
    depths = list(range(8, 8 + 2 * MAX_DEPTH))
    step = StepStats({8: 1}, 1, 2, 3, 4, 5, 6, 7, depths[:MAX_DEPTH], depths[MAX_DEPTH:])
    stats, took = SpecDecodingStats(1), RequestTotals(1, 2, 3, 4).as_output("exact")
    put(step, stats)
    sent = EngineCoreOutputs(
        outputs=[EngineCoreOutput("a", [1], kv_transfer_params=took)],
        scheduler_stats=SchedulerStats(spec_decoding_stats=stats),
    )
    received = MsgpackDecoder(EngineCoreOutputs).decode(MsgpackEncoder().encode(sent))
    try:
        arrived = take(received.scheduler_stats), received.outputs[0].kv_transfer_params
        own = SpecDecodingLogging(is_diffusion=True)
        own.observe(received.scheduler_stats.spec_decoding_stats)
        own.log(lambda *args: None)
    except (AttributeError, TypeError, LookupError, ValueError) as error:
        raise UnsupportedVllmError(f"{_WAY} is another than vllm-dllm knows ({error}); {INSTALL_SUPPORTED}") from error
    if arrived != (step, took):
        raise UnsupportedVllmError(f"{_WAY} delivered {arrived} for {(step, took)}; {INSTALL_SUPPORTED}")
