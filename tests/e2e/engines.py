"""Engines in the test's own process: they start in seconds, and a test can look inside them."""

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MAX_MODEL_LEN = 128
NUM_SLOTS = 16


def _start(checkpoint: Path, settings: dict[str, Any], changes: dict[str, Any]) -> Any:
    from vllm import LLM

    gc.collect()  # no earlier engine is finalised while this one runs: whoever stopped it still had it
    values: dict[str, Any] = {
        "model": str(checkpoint),
        "dtype": "float32",
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": NUM_SLOTS,
        "block_size": 16,
        "kv_cache_memory_bytes": 64 << 20,
        "distributed_executor_backend": "uni",
        "additional_config": {"dllm": settings},
    }
    return LLM(**(values | changes))


def _stop(llm: Any) -> None:
    llm.llm_engine.engine_core.shutdown()


_shared: dict[str, Any] = {}
"""The engine that is kept for the next test, by its arguments: one at most, as engines share vLLM's global state."""


def stop_shared_engine() -> None:
    while _shared:
        _stop(_shared.popitem()[1])


def settle(llm: Any) -> None:
    """Let an engine go idle: it tells its worker who is gone, and both compare what is left."""
    core = llm.llm_engine.engine_core.engine_core
    for _ in range(1000):
        if not core.scheduler.has_requests() and not core.batch_queue:
            return
        core.step_fn()
    raise AssertionError(f"requests never end: {[*core.scheduler.requests]}")


def settle_shared_engine() -> None:
    for llm in _shared.values():
        settle(llm)


def shared_engine(checkpoint: Path, settings: dict[str, Any], **changes: Any) -> Any:
    """Return the `LLM` of these arguments: the one at hand if it was started with them, else a new one in its place.

    Whoever changes it puts it back. Tests of one engine in several files name one `xdist_group`.
    """
    key = json.dumps([str(checkpoint), settings, changes], sort_keys=True)
    if key not in _shared:
        stop_shared_engine()
        _shared[key] = _start(checkpoint, settings, changes)
    return _shared[key]


@contextmanager
def engine(checkpoint: Path, settings: dict[str, Any], **changes: Any) -> Iterator[Any]:
    """An `LLM` of a checkpoint for one test; `changes` are engine arguments."""
    stop_shared_engine()
    llm = _start(checkpoint, settings, changes)
    try:
        yield llm
    finally:
        _stop(llm)
