"""A scheduler without vLLM's part, which is a stand-in."""

import itertools
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from vllm.distributed.aux_output_connector.connector import AuxRequestOutput
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.scheduler import Scheduler

from vllm_dllm.config import DllmConfig
from vllm_dllm.draft.acceptance import RequestAcceptance
from vllm_dllm.draft.budget import BudgetRule
from vllm_dllm.draft.calibrated import GraphDrafter
from vllm_dllm.draft.graph import DraftGraph
from vllm_dllm.engine import scheduler as module
from vllm_dllm.engine.pages import DllmPages
from vllm_dllm.engine.report import RequestReport, StepOrder
from vllm_dllm.engine.rows import StepRows
from vllm_dllm.engine.scheduler import DllmScheduler
from vllm_dllm.engine.telemetry import RequestTotals
from vllm_dllm.names import KvPolicyName
from vllm_dllm.state.report import MAX_DEPTH, Column

B = 4
MAX_NODES = 3
GRAPH = DraftGraph((((0, 0),), ((0, 0), (1, 0)), ((0, 0), (1, 0), (2, 0))), 1)


def request(name: str = "a", num_computed_tokens: int = 8, num_drafts: int = MAX_NODES) -> Any:
    """Return a running request; its row ends at 16, and vLLM counts its block and one for each draft."""
    return SimpleNamespace(
        request_id=name,
        num_computed_tokens=num_computed_tokens,
        num_tokens=num_computed_tokens,
        num_prompt_tokens=8,
        max_tokens=8,
        num_stale_output_tokens=0,
        num_output_placeholders=0,
        spec_token_ids=[-1] * (B + num_drafts),
        next_decode_eligible_step=0,
        sampling_params=None,
    )


def make(
    budget: int | None = MAX_NODES,
    running: list[Any] | None = None,
    spiffy: bool = True,
    causal: bool = False,
    kv_policy: KvPolicyName = "dual",
    scheduler: type[DllmScheduler] = DllmScheduler,
) -> Any:
    """Make a scheduler of 64 tokens per step and a `max_model_len` of 32, without vLLM's part."""
    made = object.__new__(scheduler)
    made.settings = DllmConfig(block_length=B, kv_policy="block_causal" if causal else kv_policy)
    made._check, made.pages = None, SimpleNamespace(cache_stored=None)
    made.is_causal, made.current_step = causal, 7
    made.block_length, made.max_model_len, made.max_num_scheduled_tokens = B, 32, 64
    made.running, made.waiting = running or [], []
    made.requests = {each.request_id: each for each in made.running}
    made.log_stats, made.num_spec_tokens = True, B + MAX_NODES
    made.rows = StepRows(made.settings, made.max_model_len, made.max_num_scheduled_tokens)
    made._placeholders, made._num_held, made._largest_graph = [-1] * made.num_spec_tokens, 0, 0
    for each in made.running:
        made.rows.kv.add(each.request_id, 0)
    made._exactness = "exact" if spiffy else None
    made.rule = BudgetRule(GraphDrafter(GRAPH).prior(), B, budget) if spiffy else None
    made.acceptance = RequestAcceptance()
    made._totals = defaultdict(RequestTotals)
    made._stats = made._updated_at_s = made._host_ms = None
    made._scheduled_at_s = 0.0
    return made


def row(
    refreshes: int = 0, accepted: int = 0, proposed: int = MAX_NODES, stored: int = 8, commits: int = 0
) -> RequestReport:
    return RequestReport(
        forwards=1,
        refreshes=refreshes,
        unmasked=1 + accepted,
        accepted=accepted,
        finished=0,
        stored=stored,
        wrote=0,
        commits=commits,
        left=0,
        faults=0,
        proposed=[proposed, *[0] * (MAX_DEPTH - 1)],
    )


def stand_in(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stand in for vLLM's scheduler; requests named in `emits` and `finishes` have an output."""
    stock = SimpleNamespace(emits=[], finishes=[], left=None, clock=itertools.count())

    def update(self: DllmScheduler, scheduler_output: Any, model_runner_output: Any) -> dict[int, Any]:
        stock.left = model_runner_output.aux_output_connector_output
        outputs = []
        for name in stock.emits + stock.finishes:
            params = None
            if name in stock.finishes:
                params, _ = self._free_request(self.requests[name])
            outputs.append(SimpleNamespace(request_id=name, kv_transfer_params=params))
        return {0: SimpleNamespace(outputs=outputs)}

    def free(self: DllmScheduler, freed: Any) -> tuple[None, None]:
        del self.requests[freed.request_id]
        self.running = [each for each in self.running if each is not freed]
        return None, None

    monkeypatch.setattr(Scheduler, "schedule", lambda self: [each.spec_token_ids for each in self.running])
    monkeypatch.setattr(Scheduler, "update_from_output", update)
    monkeypatch.setattr(Scheduler, "_free_request", free)
    monkeypatch.setattr(Scheduler, "_update_after_schedule", lambda self, scheduler_output: None)
    monkeypatch.setattr(Scheduler, "make_stats", lambda self, spec_decoding_stats: spec_decoding_stats)
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(stock.clock) / 1e3)
    return stock


def step(scheduler: DllmScheduler, reports: dict[str, RequestReport], **kwargs: Any) -> Any:
    output = SimpleNamespace(
        scheduled_spec_decode_tokens={name: [-1] * (B + MAX_NODES) for name in reports},
        scheduled_new_reqs=[],
        scheduled_cached_reqs=SimpleNamespace(resumed_req_ids=set()),
        preempted_req_ids=None,
        aux_output_connector_metadata=StepOrder((), None, is_long=any(each.refreshes for each in reports.values())),
    )
    vars(output).update(kwargs)
    scheduler.schedule()
    sent = {name: AuxRequestOutput(0, as_row(report)) for name, report in reports.items()}
    return scheduler.update_from_output(output, SimpleNamespace(aux_output_connector_output=sent))[0].outputs


def as_row(report: RequestReport) -> NDArray[np.int32]:
    counts = [getattr(report, column.name.lower()) for column in Column if column != Column.PROPOSED]
    return np.array([*counts, *report.proposed], dtype=np.int32)


def observed(monkeypatch: pytest.MonkeyPatch, scheduler: DllmScheduler) -> list[tuple[Any, ...]]:
    seen: list[tuple[Any, ...]] = []
    monkeypatch.setattr(
        scheduler.rule,
        "observe",
        lambda n, budget, mean, ms, host_ms, begins, _without: seen.append((n, budget, mean, ms, host_ms, begins)),
    )
    return seen


def allocated(scheduler: Any, request: Any, num_new_tokens: int, hit: int = 0) -> int | None:
    """Return up to where an allocation has pages, None for none; what is allocated may not be cached yet."""
    seen: dict[str, int] = {}

    def allocate(self: Any, request: Any, num_new_tokens: int, hit: int = 0, **options: Any) -> None:
        assert (options["delay_cache_blocks"], options["num_lookahead_tokens"]) == (True, 0)
        seen["end"] = request.num_computed_tokens + hit + num_new_tokens

    pages = object.__new__(DllmPages)
    pages.paged_end, pages.admits = scheduler._paged_end, scheduler._admits
    if not scheduler.rows.given:
        scheduler.rows.begin_step()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KVCacheManager, "allocate_slots", allocate)
        pages.allocate_slots(request, num_new_tokens, hit)
    return seen.get("end")
