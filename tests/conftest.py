"""Seeds, threads, and the skip of GPU tests where there is no GPU."""

import os

# The models are so small that a second thread only waits; on a busy machine it waits for whole time slices.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from importlib.util import find_spec

import pytest
import torch

if find_spec("hypothesis") is not None:  # a GPU machine may lack it; the tests of the ops do without
    from hypothesis import settings

    settings.register_profile("any machine", deadline=None)  # time on a busy machine says nothing
    settings.load_profile("any machine")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
