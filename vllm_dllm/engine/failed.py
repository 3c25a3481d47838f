"""The end of requests that a step found cannot go on, while the others do."""

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import RequestStatus

from vllm_dllm.state.report import Failed

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler

    from vllm_dllm.engine.report import RequestReport

logger = logging.getLogger("vllm.dllm")

_WHY = {
    Failed.POLICY: "its policy fails at it; the worker's log has the policy's error",
    Failed.TOKEN: (
        "the model gave it a token that its constraint (structured output) does not allow, as where logits are NaN or "
        "-inf; send it without the constraint and look at its logprobs, check the checkpoint's weights, and try "
        "--dtype float32"
    ),
    Failed.CANVAS: (
        "its block cannot be completed under its constraint (structured output), though each token was allowed when "
        "it was chosen; send it again, and if it ends so again, report it with its seed and vllm-dllm's version"
    ),
}


def end_failed(
    scheduler: "Scheduler", outputs: dict[int, "EngineCoreOutputs"], reports: Mapping[str, "RequestReport"]
) -> None:
    """End requests with an error, as vLLM ends those whose grammar fails; the log says of each what was found.

    Args:
        scheduler: knows the requests; those that have ended meanwhile it does not.
        outputs: of the step, by client; an end is added to them.
        reports: of the step.
    """
    failed = {name: Failed(report.failed) for name, report in reports.items() if report.failed}
    for request in scheduler.finish_requests({*failed}, RequestStatus.FINISHED_ERROR) if failed else ():
        for why in failed[request.request_id]:
            logger.error("Request %s ends with an error: %s", request.request_id, _WHY[why])
        its = outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs
        reason, events = request.get_finished_reason(), request.take_events()
        its.append(EngineCoreOutput(request.request_id, [], finish_reason=reason, events=events))
