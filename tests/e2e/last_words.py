"""What a server says when its engine is dead, and before it ends."""

import asyncio
from typing import Any

PATH = "/health-when-dead"


class HealthWhenDead:
    """Middleware (`vllm serve --middleware`): a request of `PATH` is one of `/health` from when the engine is dead.

    A client would have to ask within the moments between the engine's end and the server's.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope.get("path") == PATH:
            while not scope["app"].state.engine_client.errored:
                await asyncio.sleep(0.01)
            scope = {**scope, "path": "/health", "raw_path": b"/health"}
        await self.app(scope, receive, send)
