"""The gate changes the answer for our models on a CPU without Triton, and for nothing else."""

import inspect
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import VllmConfig

import vllm_dllm.engine.cpu as cpu
from vllm_dllm.engine.cpu import gate

OURS = frozenset({"MaskedDiffusionLM"})
MEMBERS = ("use_v2_model_runner", "_validate_v2_model_runner")


class Original(Exception):
    """Raised by the stand-ins of vLLM's members: whoever sees it has reached the original."""


def raise_original(_: Any) -> None:
    raise Original


@pytest.fixture
def gated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Install the gate around stand-ins on a CPU without Triton; everything is put back afterwards."""
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    monkeypatch.setattr(VllmConfig, "use_v2_model_runner", property(raise_original))
    monkeypatch.setattr(VllmConfig, "_validate_v2_model_runner", raise_original)
    monkeypatch.setattr("vllm.platforms.current_platform", SimpleNamespace(is_cpu=lambda: True))
    monkeypatch.setattr("vllm.triton_utils.HAS_TRITON", False)
    gate.install_gate.cache_clear()
    gate.install_gate(OURS)
    yield
    gate.install_gate.cache_clear()


def make_config(*architectures: str, unsupported: tuple[str, ...] = ()) -> VllmConfig:
    """Build as much of a config as the gate looks at."""
    config = VllmConfig.__new__(VllmConfig)
    model_config = SimpleNamespace(architectures=list(architectures)) if architectures else None
    object.__setattr__(config, "model_config", model_config)
    object.__setattr__(config, "_get_v2_model_runner_unsupported_features", lambda: list(unsupported))
    return config


@pytest.mark.usefixtures("gated")
@pytest.mark.parametrize("architectures", [("LlamaForCausalLM",), ("LlamaForCausalLM", "OtherLM"), ()], ids=str)
def test_other_models_get_the_original(architectures: tuple[str, ...]) -> None:
    config = make_config(*architectures)
    with pytest.raises(Original):
        _ = config.use_v2_model_runner
    with pytest.raises(Original):
        config._validate_v2_model_runner()


@pytest.mark.usefixtures("gated")
def test_our_model_gets_the_v2_runner() -> None:
    config = make_config(*OURS)
    assert config.use_v2_model_runner is True
    config._validate_v2_model_runner()


@pytest.mark.usefixtures("gated")
def test_only_our_model_lifts_the_workers_check(monkeypatch: pytest.MonkeyPatch) -> None:
    worker_module = SimpleNamespace(HAS_TRITON=False)
    monkeypatch.setitem(sys.modules, "vllm.v1.worker.gpu_worker", worker_module)
    with pytest.raises(Original):
        _ = make_config("LlamaForCausalLM").use_v2_model_runner
    assert worker_module.HAS_TRITON is False
    assert make_config(*OURS).use_v2_model_runner
    assert worker_module.HAS_TRITON is True


@pytest.mark.usefixtures("gated")
def test_other_checks_still_hold_for_our_model() -> None:
    with pytest.raises(ValueError, match="does not yet support: one thing, another"):
        make_config(*OURS, unsupported=("one thing", "another"))._validate_v2_model_runner()


@pytest.mark.usefixtures("gated")
def test_user_may_forbid_the_v2_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    with pytest.raises(Original):
        _ = make_config(*OURS).use_v2_model_runner


@pytest.mark.usefixtures("gated")
@pytest.mark.parametrize(
    ("target", "value"),
    [("vllm.triton_utils.HAS_TRITON", True), ("vllm.platforms.current_platform.is_cpu", lambda: False)],
    ids=["Triton for the CPU", "another device"],
)
def test_gate_is_for_a_cpu_without_triton(target: str, value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, value)
    with pytest.raises(Original):
        _ = make_config(*OURS).use_v2_model_runner
    assert not cpu.is_needed()


@pytest.mark.usefixtures("gated")
def test_gate_is_installed_once() -> None:
    before = [inspect.getattr_static(VllmConfig, member) for member in MEMBERS]
    gate.install_gate(frozenset(OURS))
    assert [inspect.getattr_static(VllmConfig, member) for member in MEMBERS] == before


@pytest.mark.usefixtures("gated")
def test_unknown_vllm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VllmConfig, "use_v2_model_runner", True)
    with pytest.raises(RuntimeError, match=r"another way than vLLM 0\.32 and 0\.33"):
        gate.install_gate(frozenset({"AnotherLM"}))


PROCESS = """
import vllm.v1.worker.cpu.shm
import vllm.v1.worker.gpu_model_runner as v1
from vllm.config import VllmConfig
from vllm.v1.worker.block_table import ComputeSlotMappingKernel
from vllm.v1.worker.gpu import block_table, buffer_utils, input_batch
from vllm_dllm.engine.cpu import activate, install_gate
from vllm_dllm.engine.cpu.binding import REPLACEMENTS

def replaced():
    holders = {"buffer_utils": buffer_utils, "input_batch": input_batch}
    kernels = [getattr(holders[n.split(".")[-2]], n.split(".")[-1]) for n in REPLACEMENTS]
    table = block_table.BlockTables
    return [*kernels, table.gather_block_tables, table.compute_slot_mappings]

stock = dict(vars(v1)), ComputeSlotMappingKernel.kernel, VllmConfig().use_v2_model_runner
originals = replaced()
install_gate(frozenset({"MaskedDiffusionLM"}))
activate()
active = replaced()
assert not any(new is old for new, old in zip(active, originals, strict=True)), active
activate()
assert all(new is old for new, old in zip(replaced(), active, strict=True))
assert (dict(vars(v1)), ComputeSlotMappingKernel.kernel, VllmConfig().use_v2_model_runner) == stock
"""


def test_activation_replaces_v2_kernels_only() -> None:
    """In a process of its own: what a stock model uses, the V1 runner and its kernels, is what it was."""
    result = subprocess.run([sys.executable, "-c", PROCESS], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
