"""Where the JSON of requests is checked before vLLM makes classes of it: in a server's app, and in a batch's file."""

import json
import reprlib
import sys
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exception_handlers import http_exception_handler
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError, ValidationInfo, field_validator
from starlette.exceptions import HTTPException
from vllm.entrypoints.anthropic.api_router import translate_error_response
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.entrypoints.serve.utils.api_utils import validate_json_request
from vllm.exceptions import VLLMClientError

from vllm_dllm.engine import score_route
from vllm_dllm.engine.canvas_stream import OPTION
from vllm_dllm.engine.edits import refuse_dropped
from vllm_dllm.engine.explain import explain_validation
from vllm_dllm.engine.malformed import refuse_malformed
from vllm_dllm.engine.pins import CANVAS, FOLLOWS, SUFFIX
from vllm_dllm.engine.refusals import RequestError, not_allowed, refuse_body, refuse_token_body
from vllm_dllm.state.pins import OPEN

_CHAT = "/v1/chat/completions"

_GENERATING = (
    *("/v1/completions", _CHAT, f"{_CHAT}/batch", "/v1/responses", "/v1/messages"),
    *("/inference/v1/generate", "/generative_scoring", "/invocations", "/cohere/v2/chat"),
)
"""Where requests that ask for tokens go; beside each there may be a `/render`."""

_LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens")

_SHOWING = ("/v1/completions", _CHAT)
"""Whose streamed replies can show canvases."""


def check_in(app: FastAPI) -> None:
    """Let a server's app refuse what is wrong with a body in its client's words, and in the form of its API; and give
    it our own route.
    """
    app.dependency_overrides[validate_json_request] = _check_request
    app.add_exception_handler(RequestValidationError, _explain)
    app.add_exception_handler(RequestError, _refuse)
    app.add_exception_handler(HTTPException, _unreadable)
    score_route.attach(app)
    app.middleware_stack = None  # vLLM built it with its handlers; it is built anew when the app starts


def check_lines() -> None:
    """Let a batch answer a line that is wrong as a server would; vLLM ends with a traceback at the first one.

    What is no JSON at all is answered under the `custom_id` that there is, or "".
    """
    module: Any = sys.modules["vllm.entrypoints.launchers.run_batch"]

    class CheckedInput(module.BatchRequestInput):
        @classmethod
        def model_validate_json(cls, json_data: str, **_: Any) -> Any:
            line: Any = None
            try:
                line = json.loads(json_data)
                return cls.model_validate(line)
            except ValidationError as error:
                why: Exception = explain_validation(error.errors(), line)
            except ValueError as error:
                text = f"the line {reprlib.repr(json_data)} is no JSON ({error}); allowed is an object; correct it"
                why = RequestError(text, parameter="line")
            name = line.get("custom_id") if isinstance(line, dict) else None
            return cls.model_construct(custom_id=str(name or ""), method="POST", url=_CHAT, body=_Refused(why))

        @field_validator("body", mode="plain")
        @classmethod
        def check_type_for_url(cls, value: Any, info: ValidationInfo) -> Any:
            url = info.data.get("url", "")
            try:
                if isinstance(value, dict):
                    check_body(url, value)
                return super().check_type_for_url(value, info)
            except ValidationError as error:
                return _Refused(explain_validation(error.errors(), value))
            except VLLMClientError as error:
                return _Refused(error)

    module.BatchRequestInput = CheckedInput


class _Refused:
    """A line's body that raises what is wrong with it when it is read, which becomes the line's reply."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __getattr__(self, name: str) -> Any:
        raise self._error


def check_body(path: str, body: dict[str, Any]) -> None:
    """Refuse what vLLM's class of the request would not show us, in the body that it is made of.

    Args:
        path: of the API.
        body: the request's JSON; is changed where vLLM would take a value for another.

    Raises: RequestError.
    """
    path = path.removesuffix("/render")
    refuse_malformed(path, body)
    if not path.endswith(_GENERATING):
        return
    _take_suffix(path, body)
    nested = body.get("sampling_params")
    options = nested.get("extra_args") if isinstance(nested, dict) else body.get("vllm_xargs")
    if isinstance(options, dict) and options.get(CANVAS) is not None:
        _make_sendable(options, nested if isinstance(nested, dict) else body)
    if isinstance(options, dict) and options.get(OPTION) and not path.endswith(_SHOWING):
        raise not_allowed(OPTION, options[OPTION], f"null here, and 'denoising' at {' and '.join(_SHOWING)}")
    if path.endswith("/inference/v1/generate"):
        refuse_token_body(body)
    else:
        refuse_body(body)
        refuse_dropped(path, body)
    if body.get("logprobs") is False:
        body["logprobs"] = None  # a number in the completions API, which would take it for 0


def _take_suffix(path: str, body: dict[str, Any]) -> None:
    """Hand a completion's suffix on as an option: vLLM knows it of models with marks for it in their prompts."""
    suffix = body.get("suffix")
    if suffix in (None, ""):
        body.pop("suffix", None)
        return
    if not path.endswith("/v1/completions"):
        raise not_allowed("suffix", suffix, "null here, and text at /v1/completions")
    if not isinstance(suffix, str):
        raise not_allowed("suffix", suffix, "null and text")
    if body.get("echo"):
        raise not_allowed("echo", body["echo"], "false beside suffix, since the reply is what lies between the two")
    options = body.get("vllm_xargs")
    if isinstance(options, dict | None):
        body["vllm_xargs"] = {**(options or {}), SUFFIX: suffix}
        del body["suffix"]


def _make_sendable(options: dict[str, Any], owner: dict[str, Any]) -> None:
    """Let a canvas through vLLM's classes: they know no null in lists, and give a request a length of their own."""
    if FOLLOWS in options:
        raise not_allowed(FOLLOWS, options[FOLLOWS], "none, since the front end sets it")
    if isinstance(options[CANVAS], list):
        options[CANVAS] = [OPEN if token is None else token for token in options[CANVAS]]
    if all(owner.get(name) is None for name in _LENGTHS):
        options[FOLLOWS] = 1


async def _check_request(raw_request: Request) -> None:
    await validate_json_request(raw_request)
    try:
        body = await raw_request.json()
    except ValueError:
        return  # whoever parses it says so
    if isinstance(body, dict):
        check_body(raw_request.url.path, body)


async def _explain(raw_request: Request, error: Any) -> JSONResponse:
    return await _refuse(raw_request, explain_validation(error.errors(), error.body))


async def _unreadable(raw_request: Request, error: Any) -> Any:
    cause = error.__cause__
    if error.status_code != HTTPStatus.BAD_REQUEST or cause is None:
        return await http_exception_handler(raw_request, error)
    return await _refuse(
        raw_request,
        RequestError(
            f"the body of the request cannot be read ({cause}); allowed is an object in JSON; correct it",
            parameter="body",
        ),
    )


async def _refuse(raw_request: Request, error: Any) -> JSONResponse:
    reply = create_error_response(error)
    if "/v1/messages" in raw_request.url.path:
        return translate_error_response(reply)
    return JSONResponse(reply.model_dump(), status_code=reply.error.code)
