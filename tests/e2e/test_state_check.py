"""The check of state in an engine: it passes, and what is corrupted while requests run is named."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.rig import Case, engine, step_all
from vllm_dllm.errors import StateError

pytestmark = [pytest.mark.engine, pytest.mark.slow("engines")]

CASES = [Case(prompt=tuple(range(4, 4 + n)), max_tokens=16) for n in (21, 34)]


@pytest.fixture(autouse=True)
def _every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_DLLM_CHECK", "1")


def scheduler_of(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


def runner_of(llm: Any) -> Any:
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner


def a_request(llm: Any) -> Any:
    return scheduler_of(llm).running[0]


def forget_a_store(llm: Any) -> str:
    request = a_request(llm)
    scheduler_of(llm)._check._accounts[request.request_id].stored -= 4
    return f"request {request.request_id}: its steps stored"


def break_a_canvas(llm: Any) -> str:
    request = a_request(llm)
    states, canvas = runner_of(llm).req_states, runner_of(llm).model_state.state.canvas
    canvas[states.req_id_to_index[request.request_id]] = 5  # nobody decided that
    return f"request {request.request_id}: "


def swap_a_page(llm: Any) -> str:
    request = a_request(llm)
    table = runner_of(llm).block_tables.block_tables[0].gpu
    table[runner_of(llm).req_states.req_id_to_index[request.request_id], 0] = 60
    return f"request {request.request_id} has the pages"


def share_a_page(llm: Any) -> str:
    scheduler = scheduler_of(llm)
    first, second = (scheduler.pages.owners[request.request_id] for request in scheduler.running)
    second.append(first[-1])
    return f"request {scheduler.running[1].request_id} has page {first[-1].block_id}"


def count_a_draft_twice(llm: Any) -> str:
    request = a_request(llm)
    scheduler_of(llm)._totals[request.request_id].proposed += 1
    return f"request {request.request_id} is told"


def keep_a_slot(llm: Any) -> str:
    states = runner_of(llm).req_states
    states.req_id_to_index["lost"] = states.free_indices.pop()
    return "request lost is in slot"


USUAL = [break_a_canvas, swap_a_page, count_a_draft_twice]
SLOW = [forget_a_store, share_a_page, keep_a_slot]  # tests/engine/test_state_check.py has what is said of them
BROKEN = [*USUAL, *(pytest.param(corrupt, marks=pytest.mark.slow("configurations")) for corrupt in SLOW)]


@pytest.mark.parametrize("corrupt", BROKEN, ids=lambda corrupt: corrupt.__name__)
def test_what_is_corrupted_is_named(mild_sdar: Path, corrupt: Callable[[Any], str]) -> None:
    said: list[str] = []

    def interfere(number: int, llm: Any) -> None:
        if number == 2:
            said.append(corrupt(llm))

    with engine(mild_sdar, {"block_length": 4}, max_num_seqs=3) as llm:
        step_all(llm, CASES[:1])
        with pytest.raises(StateError) as error:
            step_all(llm, CASES, interfere)
    assert str(error.value).startswith(said[0])
