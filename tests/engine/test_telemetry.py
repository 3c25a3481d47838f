"""What travels from the scheduler to metrics and outputs: encoding, Prometheus, the log line, the start-up curve."""

import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import prometheus_client
import pytest
import torch
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.loggers import StatLoggerManager
from vllm.v1.metrics.prometheus import unregister_vllm_metrics
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from vllm_dllm.config import DllmConfig
from vllm_dllm.draft.budget import CostCurve
from vllm_dllm.engine import costs, stat_logger, stats_way
from vllm_dllm.engine.report import PendingReport, RequestReport, take_report
from vllm_dllm.engine.stat_logger import DllmStatLogger, describe
from vllm_dllm.engine.telemetry import NUM_NUMBERS, RequestTotals, StepStats
from vllm_dllm.errors import UnsupportedVllmError
from vllm_dllm.state.report import MAX_DEPTH, REPORT_LEN

SPIFFY = SimpleNamespace(exactness="exact")
CONFIG = SimpleNamespace(model_config=SimpleNamespace(served_model_name="m", architectures=["LLaDAModelLM"]))


def row(
    forwards: int = 1, refreshes: int = 0, unmasked: int = 1, accepted: int = 0, *proposed: int, left: int = 0
) -> RequestReport:
    by_depth = [*proposed, *[0] * (MAX_DEPTH - len(proposed))]
    return RequestReport(forwards, refreshes, unmasked, accepted, 0, 0, 0, 0, left, 0, proposed=by_depth)


STEP = StepStats.of_step(
    3, 2, 70, [row(1, 1, 3, 2, 2, 1), row(1, 0, 2, 1, 2, 1), row(1, 0, 1, 0, 2, 1), row(0, 0, 0, left=5)]
)


@pytest.fixture
def logger_of() -> Any:
    def make(spiffy: Any, **kwargs: Any) -> DllmStatLogger:
        config = SimpleNamespace(**vars(CONFIG), dllm=SimpleNamespace(settings=DllmConfig(), spiffy=spiffy))
        return DllmStatLogger(config, [0, 1], **kwargs)

    unregister_vllm_metrics()
    yield make
    unregister_vllm_metrics()


def scheduler_stats(stats: StepStats) -> SchedulerStats:
    spec = SpecDecodingStats(32)
    stats_way.put(stats, spec)
    return SchedulerStats(spec_decoding_stats=spec)


def value(name: str, **labels: str) -> float | None:
    return prometheus_client.REGISTRY.get_sample_value(name, {"model_name": "m", "engine": "1", **labels})


def test_a_step_is_the_sum_of_its_rows() -> None:
    assert (STEP.forwards, STEP.refreshes, STEP.unmasked, STEP.held, STEP.budgets) == (3, 1, 6, 2, {3: 1})
    both = StepStats.of_numbers(STEP.numbers())
    both.add(STEP)
    assert (STEP.rows, both.rows) == (70, 140)
    assert StepStats.of_numbers(STEP.numbers()) == STEP
    assert STEP.proposed == [6, 3, *[0] * (MAX_DEPTH - 2)]


def test_a_walk_of_two_accepts_a_draft_of_each_depth() -> None:
    assert STEP.accepted == [2, 1, *[0] * (MAX_DEPTH - 2)]
    assert STEP.total_accepted == 3


def test_walks_beyond_the_last_depth_count_there() -> None:
    stats = StepStats.of_step(20, 0, 0, [row(1, 0, 20, MAX_DEPTH + 2)])
    assert stats.accepted == [*[1] * (MAX_DEPTH - 1), 3]


def test_statistics_survive_the_way_to_the_front_end() -> None:
    stats_way.check_way()
    sent = EngineCoreOutputs(scheduler_stats=scheduler_stats(STEP))
    received = MsgpackDecoder(EngineCoreOutputs).decode(MsgpackEncoder().encode(sent))
    assert stats_way.take(received.scheduler_stats) == STEP


def test_a_step_without_report_says_nothing() -> None:
    assert stats_way.take(None) is None
    assert stats_way.take(SchedulerStats()) is None
    assert stats_way.take(SchedulerStats(spec_decoding_stats=SpecDecodingStats(32))) is None


@pytest.mark.parametrize(
    "numbers", [[1, 2, 3], [0] * (1 + NUM_NUMBERS), [stats_way.MARK, 1]], ids=["vLLM's", "as many", "fewer"]
)
def test_numbers_that_are_not_ours_are_an_error(numbers: list[int]) -> None:
    stats = SpecDecodingStats(32, num_accepted_tokens_per_pos=numbers)
    with pytest.raises(UnsupportedVllmError, match="changed a step's numbers"):
        stats_way.take(SchedulerStats(spec_decoding_stats=stats))


def test_a_way_that_loses_something_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats_way.MsgpackDecoder, "decode", lambda self, sent: EngineCoreOutputs())
    with pytest.raises(UnsupportedVllmError, match=r"statistics in the installed vLLM (is another than|delivered)"):
        stats_way.check_way()


def test_a_request_s_numbers_add_up() -> None:
    totals = RequestTotals()
    for step in [row(1, 1, 3, 2, 2, 1), row(1, 0, 2, 1, 2, 1)]:
        totals.add(step)
    assert totals.as_output("exact") == {
        "dllm": {"exactness": "exact", "nfe": 3, "nfe_refresh": 1, "proposed": 6, "accepted": 3}
    }


def test_metrics_of_speculation(logger_of: Any) -> None:
    logger = logger_of(SPIFFY)
    for _ in range(2):
        logger.record(scheduler_stats(STEP), None, engine_idx=1)
    assert value("vllm:dllm_forwards_total") == 6
    assert value("vllm:dllm_refreshes_total") == 2
    assert value("vllm:dllm_unmasked_total") == 12
    assert value("vllm:dllm_left_masked_total") == 10
    assert value("vllm:dllm_tokens_per_forward_sum") == 2 * 6 / 4
    assert value("vllm:dllm_tokens_per_forward_bucket", le="1.0") == 0
    assert value("vllm:dllm_tokens_per_forward_bucket", le="1.5") == 2
    assert value("vllm:dllm_draft_nodes_proposed_total", exactness="exact", depth="1") == 12
    assert value("vllm:dllm_draft_nodes_accepted_total", exactness="exact", steps_ahead="2") == 2
    assert value("vllm:dllm_draft_nodes_accepted_total", exactness="exact", steps_ahead="3") is None
    assert value("vllm:dllm_steps_total", exactness="exact", budget="3") == 2
    assert value("vllm:dllm_forwards_total", engine="0") == 0


def test_without_speculation_there_are_no_draft_metrics(logger_of: Any) -> None:
    logger_of(None).record(scheduler_stats(StepStats.of_step(0, 0, 0, [row()])), None, engine_idx=1)
    assert value("vllm:dllm_forwards_total") == 1
    names = {metric.name for metric in prometheus_client.REGISTRY.collect()}
    assert not {name for name in names if "draft" in name or name == "vllm:dllm_steps"}


def test_steps_of_others_are_passed_over(logger_of: Any) -> None:
    logger = logger_of(SPIFFY)
    for stats in (None, SchedulerStats(), SchedulerStats(spec_decoding_stats=SpecDecodingStats(32))):
        logger.record(stats, None, engine_idx=1)
    assert value("vllm:dllm_forwards_total") == 0


def test_log_lines() -> None:
    assert describe(STEP, None) == (
        "Block diffusion metrics: Tokens/forward: 1.50, Forwards: 3, Refreshes: 1, Blocks: 0"
    )
    assert describe(STEP, "Spiffy") == (
        "Spiffy metrics: Tokens/forward: 1.50, Forwards: 3, Refreshes: 1, Blocks: 0, Mean accepted: 1.00, "
        "Per-depth acceptance: 0.667, 0.333, Proposed: 9, Accepted: 3, Mean budget: 3.0 (of 3 to 3)"
    )
    line = describe(StepStats.of_step(0, 0, 0, [row()]), "Self-speculation")
    assert line.startswith("Self-speculation metrics: ")
    assert "Per-depth acceptance: none" in line


def test_an_interval_is_logged_once(logger_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[Any] = []
    monkeypatch.setattr(stat_logger.logger, "info", lambda *args: lines.append(args))
    logger = logger_of(SPIFFY)
    logger.record(scheduler_stats(STEP), None, engine_idx=0)
    logger.record(scheduler_stats(StepStats.of_step(1, 0, 0, [row()])), None, engine_idx=1)
    logger.log()
    logger.log()
    assert len(lines) == 1
    assert "Forwards: 4" in lines[0][1]
    assert "Mean budget: 2.0 (of 1 to 3)" in lines[0][1]


@pytest.mark.parametrize(
    ("architecture", "is_default", "clients", "expected"),
    [
        ("LLaDAModelLM", True, 1, [True]),
        ("LLaDAModelLM", True, 2, [False]),
        ("LLaDAModelLM", False, 1, []),
        ("LlamaForCausalLM", True, 1, []),
    ],
)
def test_logger_is_added_where_vllm_adds_its_own(
    monkeypatch: pytest.MonkeyPatch, architecture: str, is_default: bool, clients: int, expected: list[bool]
) -> None:
    def init(
        self: Any, vllm_config: Any, engine_idxs: Any = None, enable_default_loggers: bool = True, client_count: int = 1
    ) -> None:
        self.engine_indexes, self.stat_loggers = engine_idxs, []

    monkeypatch.setattr(StatLoggerManager, "__init__", init)
    monkeypatch.setattr(stat_logger.logger, "isEnabledFor", lambda level: level == logging.INFO)
    monkeypatch.setattr(stat_logger, "DllmStatLogger", lambda config, engines, is_logging: (engines, is_logging))
    stat_logger.add_to_vllm()
    config = SimpleNamespace(model_config=SimpleNamespace(architectures=[architecture]))
    manager = StatLoggerManager(
        vllm_config=config, engine_idxs=[0], enable_default_loggers=is_default, client_count=clients
    )
    assert manager.stat_loggers == [([0], is_logging) for is_logging in expected]


def test_points_of_the_curve_ascend_and_are_few() -> None:
    assert list(costs.cost_points(16, 4)) == [(1, 1), (1, 2), (1, 3), (1, 5), (4, 5), (16, 5)]
    assert list(costs.cost_points(1, 1)) == [(1, 1), (1, 2)]
    for max_num_reqs in range(1, 300, 7):
        for max_budget in (1, 2, 3, 10, 64):
            rows = [num_reqs * canvases for num_reqs, canvases in costs.cost_points(max_num_reqs, max_budget)]
            assert rows == sorted(set(rows))
            assert len(rows) <= 14


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Measure a curve of steps that take so many ms, on a rank that is as slow as the others."""

    def measure(
        ms: list[float], most_rows: int = 10**6, budget: int | None = None, captured: tuple[int, ...] = ()
    ) -> tuple[Any, list[Any]]:
        asked: list[tuple[int, int, bool]] = []
        spiffy = SimpleNamespace(budget=budget, max_nodes=4)
        monkeypatch.setattr(costs, "spiffy_of", lambda config: spiffy)
        monkeypatch.setattr(costs, "settings_of", lambda config: SimpleNamespace(block_length=32))
        monkeypatch.setattr(costs, "get_tp_group", lambda: SimpleNamespace(world_size=1, is_first_rank=True))
        scheduler = SimpleNamespace(max_num_seqs=16, max_num_batched_tokens=most_rows)
        config: Any = SimpleNamespace(scheduler_config=scheduler)

        def take(shape: costs.StepShape) -> float:
            asked.append((shape.num_reqs, shape.num_canvases, shape.is_captured))
            return ms[len(asked) - 1]

        return costs.measure_curve(config, take, captured), asked

    return measure


def test_the_curve_is_of_all_points(measured: Any) -> None:
    curve, _ = measured([2.0, 3.0, 2.0, 4.0, 6.0, 9.0])
    assert curve == CostCurve(((32, 2.0), (64, 3.0), (96, 3.0), (160, 4.0), (640, 6.0), (2560, 9.0)))


def test_the_curve_arrives_as_it_was_measured() -> None:
    """With the first report, and never again."""
    curve = CostCurve(((32, 1.0), (64, 2.5)), 1)
    rows = torch.zeros(1, REPORT_LEN, dtype=torch.int32)
    output = SimpleNamespace(aux_output_connector_output=PendingReport(["a"], rows, curve))
    pending = output.aux_output_connector_output
    pending.enqueue_cpu_copy(np.zeros(1), np.zeros(1))
    output.aux_output_connector_output = pending.process_output()
    report = take_report(output)  # type: ignore[arg-type]
    assert report is not None
    assert report.costs == curve


def test_no_larger_step_is_measured_after_a_slow_one(measured: Any) -> None:
    assert measured([100.0, 501.0])[0].points == ((32, 100.0), (64, 501.0))


def test_no_step_beyond_the_token_budget_is_measured(measured: Any) -> None:
    assert measured([1.0, 2.0, 3.0], most_rows=100)[1] == [(1, 1, False), (1, 2, False), (1, 3, False)]


def test_captured_graphs_are_measured_each_and_larger_steps_as_they_come(measured: Any) -> None:
    """Of one request as long as it may have so many canvases, 5; then of as few more as it takes."""
    curve, asked = measured([1.0, 2.0, 3.0, 4.0, 9.0, 30.0], captured=(32, 96, 160, 192))
    assert asked == [(1, 1, True), (1, 3, True), (1, 5, True), (2, 3, True), (4, 5, False), (16, 5, False)]
    assert curve == CostCurve(((32, 1.0), (96, 2.0), (160, 3.0), (192, 4.0), (640, 9.0), (2560, 30.0)), 4)
    slow, _ = measured([1.0, 501.0], captured=(32, 96, 160, 192))
    assert slow == CostCurve(((32, 1.0), (96, 501.0)), 2)


def test_nothing_is_measured_for_a_fixed_budget(measured: Any) -> None:
    assert measured([], budget=2) == (None, [])
