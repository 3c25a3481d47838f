"""Our models' configuration answers for a CPU without Triton; what vLLM's own says is what it was."""

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import VllmConfig

import vllm_dllm.engine.cpu as cpu
from vllm_dllm.engine.configs import DllmVllmConfig
from vllm_dllm.engine.patches import replaced_while


class Original(Exception):
    """Raised by the stand-ins of vLLM's members: whoever sees it has reached the original."""


def raise_original(_: Any) -> None:
    raise Original


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> Any:
    """As much of a configuration as is looked at, on a CPU without Triton; vLLM's members are stand-ins."""
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    monkeypatch.setattr(VllmConfig, "use_v2_model_runner", property(raise_original))
    monkeypatch.setattr(VllmConfig, "_validate_v2_model_runner", raise_original)
    monkeypatch.setattr("vllm.platforms.current_platform", SimpleNamespace(is_cpu=lambda: True))
    monkeypatch.setattr("vllm.triton_utils.HAS_TRITON", False)
    made = object.__new__(DllmVllmConfig)
    vars(made)["_get_v2_model_runner_unsupported_features"] = list
    return made


def test_our_model_gets_the_v2_runner(config: Any) -> None:
    assert config.use_v2_model_runner is True
    config._validate_v2_model_runner()


def test_other_checks_still_hold_for_our_model(config: Any) -> None:
    vars(config)["_get_v2_model_runner_unsupported_features"] = lambda: ["one thing", "another"]
    with pytest.raises(ValueError, match="does not yet support: one thing, another"):
        config._validate_v2_model_runner()


def test_user_may_forbid_the_v2_runner(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    with pytest.raises(Original):
        _ = config.use_v2_model_runner


@pytest.mark.parametrize(
    ("target", "value"),
    [("vllm.triton_utils.HAS_TRITON", True), ("vllm.platforms.current_platform.is_cpu", lambda: False)],
    ids=["Triton for the CPU", "another device"],
)
def test_elsewhere_vllm_decides(config: Any, target: str, value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, value)
    with pytest.raises(Original):
        _ = config.use_v2_model_runner
    with pytest.raises(Original):
        config._validate_v2_model_runner()
    assert not cpu.is_needed()


@pytest.mark.parametrize("has_name", [True, False], ids=["0.33", "0.32"])
def test_the_constructor_of_our_worker_alone_sees_triton(monkeypatch: pytest.MonkeyPatch, has_name: bool) -> None:
    module = SimpleNamespace(HAS_TRITON=False) if has_name else SimpleNamespace()
    before = dict(vars(module))
    monkeypatch.setattr("vllm_dllm.engine.patches.resolve_name", lambda name: module)
    with replaced_while("gpu_worker.HAS_TRITON", True):
        assert getattr(module, "HAS_TRITON", True)
    assert vars(module) == before


PROCESS = """
import vllm.v1.worker.cpu.shm
import vllm.v1.worker.gpu_model_runner as v1
from vllm.config import VllmConfig
from vllm.v1.worker.block_table import ComputeSlotMappingKernel
from vllm.v1.worker.gpu import buffer_utils, input_batch
from vllm_dllm.engine.cpu import activate
from vllm_dllm.engine.cpu.binding import REPLACEMENTS

def replaced():
    holders = {"buffer_utils": buffer_utils, "input_batch": input_batch}
    kernels = [getattr(holders[n.split(".")[-2]], n.split(".")[-1]) for n in REPLACEMENTS]
    return kernels

stock = dict(vars(v1)), ComputeSlotMappingKernel.kernel, VllmConfig().use_v2_model_runner
originals = replaced()
activate()
active = replaced()
assert not any(new is old for new, old in zip(active, originals, strict=True)), active
activate()
assert all(new is old for new, old in zip(replaced(), active, strict=True))
assert (dict(vars(v1)), ComputeSlotMappingKernel.kernel, VllmConfig().use_v2_model_runner) == stock
"""


@pytest.mark.slow("engines")
def test_activation_replaces_v2_kernels_only() -> None:
    """In a process of its own: what a stock model uses, the V1 runner and its kernels, is what it was."""
    result = subprocess.run([sys.executable, "-c", PROCESS], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
