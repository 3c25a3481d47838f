"""Seeds, threads, the skip of GPU tests where there is no GPU, and which tests run, where and in which order."""

import gc
import os
import sys

# The models are so small that a second thread only waits; and what waits sleeps, since another worker has tests to run.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Every engine compares what scheduler and worker know, at the latest when it goes idle.
os.environ.setdefault("VLLM_DLLM_CHECK", "idle")

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.suite import slow
from tests.suite.order import check_groups, group_items

if find_spec("hypothesis") is not None:  # a GPU machine may lack it; the tests of the ops do without
    from hypothesis import settings

    # Time on a busy machine says nothing; and a change is not to fail by an example that none before it was given.
    settings.register_profile("search", deadline=None)
    settings.register_profile("any machine", deadline=None, derandomize=True)
    settings.load_profile("any machine")


@pytest.fixture(autouse=True)
def _torch_state() -> Iterator[None]:
    """Each test begins with the same seed, and leaves torch's dispatch as it was: else tests behind it would fail."""
    torch.manual_seed(0)
    yield
    python = torch._C.DispatchKey.Python
    is_excluded = torch._C._dispatch_tls_is_dispatch_key_excluded(python)
    torch._C._dispatch_tls_set_dispatch_key_excluded(python, False)
    assert not is_excluded, "the test left torch without dispatch modes; if it traces, let it use `collected`"


@pytest.fixture
def collected() -> Iterator[None]:
    """For tests that trace: what earlier tests left is finalised before, and nothing while they run.

    vLLM's CPU matmuls call ops as they are finalised, which under a fake tensor mode fail, recur until the process
    ends, or leave torch without dispatch modes.
    """
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def pytest_addoption(parser: pytest.Parser) -> None:
    which = f"which tests marked slow to run: {', '.join(slow.CHOICES)}, or groups with commas between them"
    parser.addoption("--slow", type=slow.option, default="none", help=which)


def pytest_configure(config: pytest.Config) -> None:
    slow.configure(config)


def pytest_report_header(config: pytest.Config) -> list[str]:
    return slow.header(config)


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups next
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    slow.select(config, items)
    group_items(items)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """No test without an engine runs beside the one that is kept for others: vLLM's global state would be its own."""
    engines = sys.modules.get("tests.e2e.engines")
    if engines is not None and not item.path.is_relative_to(Path(__file__).parent / "e2e"):
        engines.stop_shared_engine()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node: Any, ids: list[str]) -> None:
    if node.config.option.dist == "loadgroup":
        check_groups(ids)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    slow.record(session.config, exitstatus)
