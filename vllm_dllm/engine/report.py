"""What a step is told, and its report: from the scheduler to the workers and back.

The report travels where vLLM's V2 runner has a place for a step's auxiliary outputs. The runner asks its
`aux_output_connector` for them when it has sampled, copies them to the host on the stream and under the event of the
sampler's own output, and gives them to the scheduler as `ModelRunnerOutput.aux_output_connector_output`, which a
scheduler without such a connector does not read. What the scheduler tells goes the other way, as
`SchedulerOutput.aux_output_connector_metadata`. vLLM makes this connector for routed experts alone; `ReportConnector`
has its three methods and is set by our worker. `check_way` sends a known pattern along the report's way when a worker
starts.
"""

import pickle
from collections.abc import Collection, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from vllm.distributed.aux_output_connector.connector import AuxRequestOutput
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.worker.gpu.async_utils import AsyncOutput
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from vllm_dllm.draft.budget import CostCurve
from vllm_dllm.errors import INSTALL_SUPPORTED, UnsupportedVllmError
from vllm_dllm.state.kv import KvStep
from vllm_dllm.state.report import FAILED, REPORT_LEN, Column

COSTS = "\0costs"
"""Stands in place of a request id; no request has it."""


@dataclass(frozen=True, slots=True)
class StepOrder:
    """What the scheduler tells the workers with a step.

    Attributes:
        requests: that take it, by their ids.
        kv: what it stores of each of them; None: the scheduler is ahead of reports, so the workers decide it.
        is_long: whether it may have segments that no captured CUDA graph has.
        roster: who should be in the workers' slots, where that is checked.
        may_be_void: whether the block of a request may have ended, of whom the scheduler did not know so.
        num_rows: of its forward, without those that pad it.
        shows_canvas: whether the report is to have the canvases that the step leaves behind.
        canvases: with which requests begin that come back after a preemption, where canvases are kept; negative for
            masked.
        drafts: rows of the drafts of requests whose windows have any (`draft.windows`).
        ended: requests that ended since the step before; others that left their slots come back.
    """

    requests: tuple[str, ...]
    kv: KvStep | None
    is_long: bool = False
    roster: frozenset[str] | None = None
    may_be_void: bool = False
    num_rows: int = 0
    shows_canvas: bool = False
    canvases: Mapping[str, list[int]] = field(default_factory=dict)
    drafts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    ended: Collection[str] = ()

    def kv_of(self, requests: Sequence[str]) -> KvStep | None:
        """Return what it stores of its requests, in another order."""
        if self.kv is None:
            return None
        index = {request: i for i, request in enumerate(self.requests)}
        return self.kv.of([index[request] for request in requests])


@dataclass(slots=True)
class RequestReport:
    """What the worker did for a request in a step; first what `state.report.Column` counts, in its order.

    Attributes:
        faults: why it has to end (`state.report.Failed`); what is wrong with its canvas (`worker_check.Fault`), where
            that is checked.
        proposed: drafts that were evaluated, by depth 1..MAX_DEPTH.
        canvas: [block_length] the one behind the step, negative for masked (`draft.windows.with_order`), where it is
            shown; else empty.
        logprobs: [block_length] of its tokens, NaN where there is none, where it is shown; else empty.
        pages: its pages as the worker has them, where they are checked.
    """

    forwards: int
    refreshes: int
    unmasked: int
    accepted: int
    finished: int
    stored: int
    wrote: int
    commits: int
    left: int
    faults: int
    _: KW_ONLY
    proposed: list[int]
    canvas: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    pages: list[int] | None = None

    @classmethod
    def of_row(cls, row: list[int], canvas_length: int = 0) -> "RequestReport":
        """Read a row of `REPORT_LEN` numbers, behind them the canvas and the bits of its log-probabilities where it is
        shown, and the number of pages and the pages where they are checked.
        """
        middle = REPORT_LEN + canvas_length
        end = middle + canvas_length
        counts, proposed, canvas = row[: Column.PROPOSED], row[Column.PROPOSED : REPORT_LEN], row[REPORT_LEN:middle]
        logprobs = np.array(row[middle:end], np.int32).view(np.float32).tolist() if canvas_length else []
        pages = row[end + 1 : end + 1 + row[end]] if len(row) > end else None
        return cls(*counts, proposed=proposed, canvas=canvas, logprobs=logprobs, pages=pages)

    @property
    def failed(self) -> int:
        """Why it has to end: bits of `state.report.Failed`; 0 for no reason."""
        return self.faults & FAILED


@dataclass(slots=True)
class StepReport:
    """What a step did."""

    requests: dict[str, RequestReport]  # of all in its batch, by their ids
    costs: CostCurve | None = None  # with the first report where budgets are chosen by it


def take_report(output: ModelRunnerOutput, canvas_length: int = 0) -> StepReport | None:
    """Take the report off a step's output; None where there is none, as of a step without requests.

    Args:
        output: changed.
        canvas_length: positions of canvases in it, 0 where none are shown.

    Raises: UnsupportedVllmError where it is not as it was sent.
    """
    sent: Mapping[str, AuxRequestOutput] | None = output.aux_output_connector_output
    output.aux_output_connector_output = None
    if sent is None:
        return None
    try:
        rows = {req_id: each.rows.tolist() for req_id, each in sent.items()}
        costs = rows.pop(COSTS, None)
        requests = {req_id: RequestReport.of_row(row, canvas_length) for req_id, row in rows.items()}
        return StepReport(requests, costs and _read_curve(costs))
    except (AttributeError, TypeError, IndexError) as error:
        raise UnsupportedVllmError(f"{_WAY} changed a step's report ({error}); {INSTALL_SUPPORTED}") from error


_WAY = "The way of auxiliary outputs in the installed vLLM"


class PendingReport:
    """A report that is still on the device.

    Args:
        request_ids: of the batch.
        rows: [num_reqs, REPORT_LEN or more] int32.
        costs: what goes with it.
    """

    def __init__(self, request_ids: Sequence[str], rows: Tensor, costs: CostCurve | None) -> None:
        self._request_ids = request_ids
        self._on_device, self._costs = rows, costs  # kept, since another stream reads them
        self._rows: np.ndarray | None = None

    def enqueue_cpu_copy(self, num_sampled: np.ndarray, num_rejected: np.ndarray) -> None:
        """Called on the stream of the step's output copies."""
        self._rows = self._on_device.to("cpu", non_blocking=True, copy=True).numpy()

    def process_output(self) -> dict[str, AuxRequestOutput]:
        """Called when they are done."""
        assert self._rows is not None, "enqueue_cpu_copy comes before"
        sent = {
            req_id: AuxRequestOutput(int(row[Column.STORED]), row)
            for req_id, row in zip(self._request_ids, self._rows, strict=True)
        }
        if self._costs is not None:
            sent[COSTS] = AuxRequestOutput(0, np.array([(self._costs.num_captured, 0.0), *self._costs.points]))
        return sent


class Steps(Protocol):
    """Who takes steps, and knows what they did."""

    def take_order(self, order: StepOrder) -> None:
        """Take what the scheduler tells of the next step, when requests were added and removed."""

    def take_rows(self, input_batch: InputBatch) -> Tensor:
        """Return the report of a batch that was just sampled; [num_reqs, REPORT_LEN or more] int32."""


class ReportConnector:
    """The worker's side, as vLLM's runner calls it.

    Args:
        steps: the sampler.
        costs: sent with the first report.
    """

    def __init__(self, steps: Steps, costs: CostCurve | None) -> None:
        self._steps, self._costs = steps, costs

    def begin_step(self, metadata: Any) -> None:
        """Called at the begin of each step. Raises: UnsupportedVllmError where our scheduler's order did not arrive."""
        if not isinstance(metadata, StepOrder):
            raise UnsupportedVllmError(
                f"{_WAY} brought {metadata!r} with a step, and no order of ours; {INSTALL_SUPPORTED}"
            )
        self._steps.take_order(metadata)

    def prepare_output(self, input_batch: InputBatch) -> PendingReport:
        """Called behind the sampler."""
        costs, self._costs = self._costs, None
        return PendingReport(input_batch.req_ids, self._steps.take_rows(input_batch), costs)

    def close(self) -> None:
        """Called at the end; there is nothing to do."""


def check_way(main_stream: Any, copy_stream: Any, device: torch.device) -> None:
    """Send a known pattern from a worker's device to where the scheduler takes reports.

    Raises: UnsupportedVllmError where something else arrives.
    """
    pattern = torch.arange(2 * REPORT_LEN, dtype=torch.int32).view(2, -1)
    costs = CostCurve(((1, 0.5), (3, 2.0)), 1)
    expected = StepReport({name: RequestReport.of_row(row) for name, row in zip("ab", pattern.tolist(), strict=True)})
    expected.costs = costs
    none = torch.zeros(2, dtype=torch.int32, device=device)
    try:
        output = AsyncOutput(
            ModelRunnerOutput(req_ids=["a", "b"], req_id_to_index={"a": 0, "b": 1}),
            SamplerOutput(none[:, None], None, None, none, none),
            none,
            main_stream,
            copy_stream,
            check_ep_fault=False,
            pending_aux_output=PendingReport(["a", "b"], pattern.to(device), costs),
        ).get_output()
    except (TypeError, AttributeError) as error:
        raise UnsupportedVllmError(f"{_WAY} is another than vllm-dllm knows ({error}); {INSTALL_SUPPORTED}") from error
    received = take_report(pickle.loads(pickle.dumps(output)))
    if received != expected:
        raise UnsupportedVllmError(f"{_WAY} delivered {received} for {expected}; {INSTALL_SUPPORTED}")


def _read_curve(rows: Any) -> CostCurve:
    """Take the cost curve of what was sent: the number of captured points, then the points."""
    (num_captured, _), *points = rows
    return CostCurve(tuple((int(rows_of), ms) for rows_of, ms in points), int(num_captured))
