"""Requests that a step found cannot go on: they end with an error, which the log tells of with their ids."""

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.request import RequestStatus

from tests.engine.scheduler_rig import row
from vllm_dllm.engine.failed import end_failed
from vllm_dllm.engine.worker_check import Fault
from vllm_dllm.state.report import Failed


def request(name: str) -> Any:
    return SimpleNamespace(
        request_id=name,
        client_index=0,
        get_finished_reason=lambda: FinishReason.ERROR,
        take_events=lambda: None,
    )


def test_who_cannot_go_on_ends_and_the_log_says_why(caplog: pytest.LogCaptureFixture) -> None:
    known = {name: request(name) for name in ("policy", "token", "canvas", "checked", "well")}
    faults = {"policy": Failed.POLICY, "token": Failed.TOKEN, "canvas": Failed.CANVAS, "checked": Fault.NO_MASK}
    reports = {name: row() for name in (*known, "gone")}
    for name, fault in (faults | {"gone": Failed.TOKEN}).items():
        reports[name].faults = int(fault)

    def finish(names: set[str], status: RequestStatus) -> list[Any]:
        assert status == RequestStatus.FINISHED_ERROR
        return [known.pop(name) for name in sorted(names & known.keys())]

    emitted = EngineCoreOutput("well", [5])
    outputs = {0: EngineCoreOutputs(outputs=[emitted])}
    end_failed(SimpleNamespace(finish_requests=finish), outputs, reports)  # type: ignore[arg-type]
    assert [each.request_id for each in outputs[0].outputs] == ["well", "canvas", "policy", "token"]
    assert {each.finish_reason for each in outputs[0].outputs[1:]} == {FinishReason.ERROR}
    said = [record.getMessage() for record in caplog.records]
    assert [message.split(":")[0] for message in said] == [
        f"Request {name} ends with an error" for name in ("canvas", "policy", "token")
    ]
    for message, found, advice in zip(
        said,
        ("block cannot be completed under its constraint", "policy fails", "that its constraint"),
        ("send it again", "the worker's log", "check the checkpoint's weights"),
        strict=True,
    ):
        assert found in message
        assert advice in message
    # Another step may have been under way.
    end_failed(SimpleNamespace(finish_requests=finish), outputs, reports)  # type: ignore[arg-type]
    assert (len(outputs[0].outputs), len(caplog.records)) == (4, 3)
