"""A request's canvas as it is denoised, shown beside its tokens: what `dllm_stream: "denoising"` asks for.

The worker adds the canvases behind a step to its report, if the step has such a request. The scheduler makes an output
of each that has no tokens, or adds it to one that has: where vLLM lets a scheduler return something,
`kv_transfer_params`. Tokens are emitted in blocks as ever.
"""

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs

from vllm_dllm.config import REQUEST_PREFIX
from vllm_dllm.state.kv import KvSchedule

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from vllm_dllm.engine.report import RequestReport
    from vllm_dllm.engine.telemetry import RequestTotals

OPTION = f"{REQUEST_PREFIX}stream"
_LEAST_LOGPROB = -9999.0
"""JSON has no -inf; vLLM sends this."""


def is_watched(extra_args: Mapping[str, Any] | None) -> bool:
    """Tell whether a request with these `extra_args` asks for its canvas."""
    return bool(extra_args and extra_args.get(OPTION))


def watched(requests: Iterable["Request"]) -> bool:
    """Tell whether any of some requests asks for its canvas."""
    return any(request.sampling_params and is_watched(request.sampling_params.extra_args) for request in requests)


def show_canvases(
    outputs: dict[int, "EngineCoreOutputs"],
    reports: Mapping[str, "RequestReport"],
    requests: Mapping[str, "Request"],
    totals: Mapping[str, "RequestTotals"],
    kv: "KvSchedule",
) -> None:
    """Note what is known of the blocks of requests that asked for it, and have an output made of it.

    Args:
        outputs: of the step, by client; one without tokens is added where a request has none.
        reports: of the step, with canvases.
        requests: that still run, with the step's tokens.
        totals: of requests; changed.
        kv: knows where blocks begin.
    """
    for req_id in reports.keys() & requests.keys():
        request = requests[req_id]
        if not watched([request]) or req_id not in totals:
            continue
        num_known = request.num_tokens - int(kv.block_start(np.array(request.num_tokens)))
        left = request.max_tokens - request.num_output_tokens
        canvas = reports[req_id].canvas[num_known:][:left]
        shown = {"canvas_start": request.num_output_tokens, "canvas": [None if i < 0 else i for i in canvas]}
        if request.sampling_params.logprobs is not None:
            logprobs = reports[req_id].logprobs[num_known:]
            shown["canvas_logprobs"] = [_known(*each) for each in zip(canvas, logprobs, strict=False)]
        totals[req_id].canvas = shown
        its = outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs
        if all(output.request_id != req_id for output in its):
            # vLLM reads what a prefill did from a request's first output alone.
            prefill = request.take_prefill_stats()
            its.append(EngineCoreOutput(req_id, [], events=request.take_events(), prefill_stats=prefill))


def _known(token: int, logprob: float) -> float | None:
    """Return the log-probability of a canvas's token, bounded as vLLM bounds it; None: masked, or no step's."""
    return None if token < 0 or math.isnan(logprob) else max(logprob, _LEAST_LOGPROB)
