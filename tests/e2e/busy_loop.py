"""A server's event loop under load."""

import asyncio
import time
from typing import Any

PATH = "/busy"


class BusyLoop:
    """Middleware (`vllm serve --middleware`): from a request of `PATH` on, the event loop turns ten times a second.

    What other threads hand to the loop meets in one turn then.
    """

    def __init__(self, app: Any) -> None:
        self.app = app
        self.tasks: list[asyncio.Task[None]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope.get("path") == PATH:
            self.tasks.append(asyncio.create_task(self._block()))
        await self.app(scope, receive, send)

    async def _block(self) -> None:
        while True:
            time.sleep(0.1)
            await asyncio.sleep(0)
