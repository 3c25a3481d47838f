"""Fixtures of the tests that start an engine."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.dream import make_wild_dream
from tests.e2e.engines import settle_shared_engine
from tests.e2e.rig import CHECKPOINT, Oracle, stop_shared_engine
from tests.e2e.sdar import SdarOracle, make_wild_sdar
from tests.e2e.wild import make_wild_checkpoint


@pytest.fixture(scope="session", autouse=True)
def _in_process() -> Iterator[None]:
    """Keep the engine core in this process (vLLM reads the variable when an engine is made)."""
    before = os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    yield
    stop_shared_engine()
    if before is None:
        del os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"]
    else:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = before


@pytest.fixture(scope="module", autouse=True)
def _settled() -> Iterator[None]:
    """Have the shared engine's state checked at the end of each file."""
    yield
    settle_shared_engine()


@pytest.fixture(scope="session")
def wild(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a random model."""
    path = tmp_path_factory.mktemp("wild") / "checkpoint"
    make_wild_checkpoint(path)
    return path


@pytest.fixture(scope="session")
def oracle(wild: Path) -> Oracle:
    """The reference decoder on the random model."""
    return Oracle(wild)


@pytest.fixture(scope="session")
def mild(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a random model that can be foreseen a little."""
    path = tmp_path_factory.mktemp("mild") / "checkpoint"
    make_wild_checkpoint(path, mixing=0.05)
    return path


@pytest.fixture(scope="session")
def mild_oracle(mild: Path) -> Oracle:
    """The reference decoder on this model."""
    return Oracle(mild)


@pytest.fixture(scope="session")
def mild_dream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a random Dream model that can be foreseen a little."""
    path = tmp_path_factory.mktemp("mild_dream") / "checkpoint"
    make_wild_dream(path, mixing=0.05)
    return path


@pytest.fixture(scope="session")
def trained() -> Oracle:
    """The reference decoder on the trained model of the repository."""
    return Oracle(CHECKPOINT)


@pytest.fixture(scope="session")
def wild_sdar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a random SDAR model."""
    path = tmp_path_factory.mktemp("wild_sdar") / "checkpoint"
    make_wild_sdar(path)
    return path


@pytest.fixture(scope="session")
def mild_sdar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a random SDAR model that can be foreseen a little."""
    path = tmp_path_factory.mktemp("mild_sdar") / "checkpoint"
    make_wild_sdar(path, mixing=0.05)
    return path


@pytest.fixture(scope="session")
def sdar_oracle(wild_sdar: Path) -> SdarOracle:
    """The reference decoder on the random SDAR model."""
    return SdarOracle(wild_sdar)


@pytest.fixture(scope="session")
def mild_sdar_oracle(mild_sdar: Path) -> SdarOracle:
    """The reference decoder on the one that can be foreseen a little."""
    return SdarOracle(mild_sdar)
