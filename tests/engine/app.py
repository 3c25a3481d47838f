"""vLLM's HTTP app without an engine: what passes all checks of a body is answered with `PASSED`."""

import logging
from types import SimpleNamespace
from typing import Any

from fastapi import FastAPI
from fastapi.testclient import TestClient
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ErrorResponse
from vllm.utils.argparse_utils import FlexibleArgumentParser

try:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
except ImportError:  # 0.33 has it elsewhere
    from vllm.entrypoints.common.cli_args import make_arg_parser

PASSED = "passed"


class Serving:
    """Every API's serving class, whose methods take a request that vLLM's class of it could be made of."""

    def __getattr__(self, name: str) -> Any:
        async def reply(*_: Any) -> ErrorResponse:
            return ErrorResponse(error=ErrorInfo(message=PASSED, type="Teapot", code=418))

        return reply


def arguments(*architectures: str) -> tuple[Any, ...]:
    """The command line's arguments of a server, and the configurations of models."""
    args = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    return args, *(SimpleNamespace(architectures=[name], get_pooling_task=lambda _: None) for name in architectures)


def app_of(architecture: str) -> FastAPI:
    args, model_config = arguments(architecture)
    level = logging.root.level
    app = build_app(args, ("generate",), model_config)
    logging.root.setLevel(level)  # a package that vLLM adds to its app sets it
    for api in ("chat", "completion", "responses", "chat_batch"):
        setattr(app.state, f"openai_serving_{api}", Serving())
    app.state.anthropic_serving_messages = app.state.serving_tokens = Serving()
    return app


def client_of(app: FastAPI) -> TestClient:
    return TestClient(app, raise_server_exceptions=False)
