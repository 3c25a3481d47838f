"""Fixtures of the tests that start an engine."""

import os
from collections.abc import Iterator

import pytest

from tests.e2e.rig import Oracle


@pytest.fixture(scope="session", autouse=True)
def _in_process() -> Iterator[None]:
    """Keep the engine core in this process (vLLM reads the variable when an engine is made)."""
    before = os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    yield
    if before is None:
        del os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"]
    else:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = before


@pytest.fixture(scope="session")
def oracle() -> Oracle:
    return Oracle()
