"""Engines in processes of their own, so that several live at once and take turns.

One engine per process is what vLLM supports. Only the engine whose turn it is has work; the others wait for a message.
"""

import multiprocessing
import os
from dataclasses import replace
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

from vllm_dllm.measure.workload import EngineSpec, Measurement


class EngineEndedError(RuntimeError):
    """The process of an engine ended before its work did; it has logged why."""


class EngineProcess:
    """An engine that was started; `close` stops it."""

    def __init__(self, spec: EngineSpec) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, spec), daemon=True)
        self._process.start()
        theirs.close()
        self._receive()

    def measure(
        self, concurrency: int, budget: int | None = None, num_prompts: int | None = None, first: int = 0
    ) -> Measurement:
        """Decode prompts of the workload once.

        Args:
            concurrency: requests in flight.
            budget: drafts of each step; None leaves the engine as it is.
            num_prompts: of the workload; None is all.
            first: the first of them.

        Raises: EngineEndedError.
        """
        self._connection.send((concurrency, budget, num_prompts, first))
        measurement = self._receive()
        assert isinstance(measurement, Measurement), "what _serve sends"
        return measurement

    def close(self) -> None:
        """Stop the engine."""
        self._connection.close()
        self._process.join()

    def _receive(self) -> object:
        try:
            return self._connection.recv()
        except EOFError:
            raise EngineEndedError("an engine ended before it was done; its messages are above") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _serve(connection: "Connection[Any, Any]", spec: EngineSpec) -> None:
    """Start an engine and measure until the other end is closed."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm_dllm.engine.measuring import StepNotes, measure, set_budget, start_engine

    llm, notes = start_engine(spec), StepNotes()
    llm.llm_engine.logger_manager.stat_loggers.append(notes)
    connection.send("ready")
    while True:
        try:
            concurrency, budget, num_prompts, first = connection.recv()
        except EOFError:
            break
        if budget is not None:
            set_budget(llm, budget)
        whole = spec.workload
        chosen = whole.prompts[first:][:num_prompts]
        workload = replace(whole, prompts=chosen, seed=whole.seed + first)
        connection.send(measure(llm, notes, workload, concurrency))
    llm.llm_engine.engine_core.shutdown()
