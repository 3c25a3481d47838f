"""The route of a server that says how likely continuations are: `POST /v1/dllm/loglikelihood`."""

import math
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from vllm.entrypoints.serve.utils.api_utils import load_aware_call, validate_json_request, with_cancellation
from vllm.utils import random_uuid

from vllm_dllm.engine.scoring import Question, Scoring, answer

ROUTE = "/v1/dllm/loglikelihood"

_Tokens = list[Annotated[int, Field(strict=True)]]


class LoglikelihoodRequest(BaseModel):
    """What a client sends: texts alone, or token ids alone."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    context: str | _Tokens
    continuations: list[str | _Tokens]
    samples: Annotated[int, Field(strict=True)] = 128
    seed: Annotated[int, Field(strict=True)] = 0


def attach(app: FastAPI) -> None:
    """Give a server's app the route."""
    app.add_api_route(ROUTE, _loglikelihood, methods=["POST"], dependencies=[Depends(validate_json_request)])


@with_cancellation
@load_aware_call
async def _loglikelihood(request: LoglikelihoodRequest, raw_request: Request) -> Any:
    state = raw_request.app.state
    unknown = await state.openai_serving_models.registry.check_model(request.model)
    if unknown is not None:
        return JSONResponse(unknown.model_dump(), status_code=unknown.error.code)
    question = Question(request.context, request.continuations, request.samples, request.seed)
    scoring = Scoring(question, state.vllm_config, state.engine_client.input_processor.tokenizer)
    estimates = await answer(state.engine_client, scoring)
    num_tokens = sum(len(context) + len(continuation) for context, continuation in scoring.pairs)
    return JSONResponse(
        {
            "id": f"loglikelihood-{random_uuid()}",
            "object": "dllm.loglikelihood",
            "model": request.model or state.openai_serving_models.model_name(),
            "samples": request.samples,
            "choices": [
                {
                    "index": i,
                    "loglikelihood": each.value,
                    "standard_error": None if math.isnan(each.standard_error) else each.standard_error,
                    "tokens": each.tokens,
                }
                for i, each in enumerate(estimates)
            ],
            "usage": {"prompt_tokens": num_tokens, "completion_tokens": 0, "total_tokens": num_tokens},
        }
    )
