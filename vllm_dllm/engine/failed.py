"""The end of requests at which their policy, a user's, failed."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import RequestStatus

from vllm_dllm.state.report import POLICY_FAILED

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler

    from vllm_dllm.engine.report import RequestReport


def end_failed(
    scheduler: "Scheduler", outputs: dict[int, "EngineCoreOutputs"], reports: Mapping[str, "RequestReport"]
) -> None:
    """End requests with an error, as vLLM ends those whose grammar fails; the worker said in its log what it was.

    Args:
        scheduler: knows the requests; those that have ended meanwhile it does not.
        outputs: of the step, by client; an end is added to them.
        reports: of the step.
    """
    failed = {name for name, report in reports.items() if report.faults & POLICY_FAILED}
    for request in scheduler.finish_requests(failed, RequestStatus.FINISHED_ERROR) if failed else ():
        its = outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs
        reason, events = request.get_finished_reason(), request.take_events()
        its.append(EngineCoreOutput(request.request_id, [], finish_reason=reason, events=events))
