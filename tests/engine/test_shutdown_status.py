"""With which status a server ends: 1 where its engine had failed, 0 where it was told to stop."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_dllm.engine import serving


class Client:
    """An engine client that has served: vLLM's shutdown leaves its engine dead."""

    def __init__(self, loop: asyncio.AbstractEventLoop, *, is_dead: bool) -> None:
        self.output_handler = SimpleNamespace(get_loop=lambda: loop)
        self.engine_core = SimpleNamespace(resources=SimpleNamespace(engine_dead=is_dead))
        self.model_config = SimpleNamespace(architectures=["LLaDAModelLM"])
        self.errors: list[Exception] = []
        self.output_processor = SimpleNamespace(propagate_error=self.errors.append)
        self.timeouts: list[float | None] = []


def stop(client: Any, timeout: float | None) -> None:
    client.timeouts.append(timeout)
    client.engine_core.resources.engine_dead = True


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(serving, "_APPS", [object()])
    made = asyncio.new_event_loop()
    yield made
    made.close()


def test_a_server_that_is_told_to_stop_ends_in_order(loop: asyncio.AbstractEventLoop) -> None:
    """vLLM's server shuts its client down twice: when the signal comes, and when it leaves."""
    client, shutdown = Client(loop, is_dead=False), serving._with_errors_sent(stop)
    shutdown(client, 60)
    shutdown(client)
    assert client.timeouts == [60, None]


def test_a_server_whose_engine_failed_ends_with_status_1(loop: asyncio.AbstractEventLoop) -> None:
    client, shutdown = Client(loop, is_dead=True), serving._with_errors_sent(stop)
    with pytest.raises(SystemExit, match="ends with status 1"):
        shutdown(client, 60)
    assert client.timeouts == [60]
