"""`vllm-dllm doctor` says what works, and for the rest what mends it."""

import importlib.metadata
import re
import types

import pytest
import torch
from typer.testing import CliRunner

from vllm_dllm.cli import doctor as doctor_module
from vllm_dllm.cli.doctor import Finding, cpu_kernels, cuda_kernels, runs_on
from vllm_dllm.cli.main import app
from vllm_dllm.errors import KernelUnavailable
from vllm_dllm.ops import load
from vllm_dllm.self_test import isolated
from vllm_dllm.self_test.check import Check
from vllm_dllm.self_test.isolated import Request


def forget(monkeypatch: pytest.MonkeyPatch, *distributions: str) -> None:
    """Let distributions not be installed."""
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name in distributions:
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)


def entry_points(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    entries = [types.SimpleNamespace(name=name, value="vllm_dllm.plugin:register") for name in names]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: entries)


def find(topic: str) -> list[Finding]:
    return [finding for finding in doctor_module.examine() if finding.topic == topic]


def test_the_exit_status_is_0_where_models_can_be_served(monkeypatch):
    monkeypatch.setattr(doctor_module, "examine", lambda: [Finding("torch", "9"), Finding("x", "slower", "missing")])
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0
    assert re.fullmatch(r"ok +torch +9\nmissing +x +slower\n", result.stdout)


def test_the_exit_status_is_1_where_none_can(monkeypatch):
    monkeypatch.setattr(doctor_module, "examine", lambda: [Finding("vLLM", "is not installed", "broken")])
    assert CliRunner().invoke(app, ["doctor"]).exit_code == 1


def test_a_library_of_the_system_that_vllm_needs_is_named(monkeypatch, tmp_path):
    """vLLM's kernels for CPUs name it; other builds of vLLM do not ask for it."""
    folder = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(doctor_module, "find_spec", lambda name: folder if name == "vllm" else None)
    monkeypatch.setattr(doctor_module, "LIBNUMA", "libnuma-none.so.1")
    (tmp_path / "_C_empty.so").touch()
    (tmp_path / "_C.abi3.so").write_bytes(b"\x7fELF libcudart.so.12\0")
    assert list(doctor_module.system_libraries()) == []
    (tmp_path / "_C_AVX2.abi3.so").write_bytes(b"\x7fELF\0libnuma-none.so.1\0")
    (found,) = doctor_module.system_libraries()
    assert (found.topic, found.level) == ("libnuma", "broken")
    assert "libnuma-none.so.1: cannot open shared object file" in found.text
    assert "`apt install libnuma1`" in found.text
    monkeypatch.setattr(doctor_module, "LIBNUMA", "libc.so.6")
    (tmp_path / "_C_AVX2.abi3.so").write_bytes(b"\x7fELF\0libc.so.6\0")
    assert list(doctor_module.system_libraries()) == []


def test_this_environment(monkeypatch):
    pytest.importorskip("vllm")
    entry_points(monkeypatch, "dllm")
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    found = {finding.topic: finding for finding in doctor_module.examine()}
    assert [finding for finding in found.values() if finding.level == "broken"] == []
    assert found["vLLM"].text == importlib.metadata.version("vllm")
    assert torch.__version__ in found["torch"].text
    assert "LLaDAModelLM, DreamModel, SDARForCausalLM" in found["plugin"].text
    assert found["native ops"] == Finding("native ops", f"{', '.join(load.OPS)}, from {load.LIBRARY}")


def test_kernels_of_another_machine():
    finding = cpu_kernels("portable", "avx512", ["portable", "avx512_bf16"])
    assert finding.level == "missing"
    assert "built for portable, avx512_bf16 and not for avx512, which this machine has" in finding.text
    assert cpu_kernels("portable", "avx2", ["portable", "avx2"]).level == "ok"


def test_no_vllm(monkeypatch):
    forget(monkeypatch, "vllm")
    assert doctor_module.vllm() == Finding(
        "vLLM", "is not installed; install it: `pip install 'vllm>=0.32,<0.34'`", "broken"
    )


def test_another_vllm(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.99.0")
    finding = doctor_module.vllm()
    assert finding.level == "broken"
    assert "vLLM 0.99.0 is installed, vllm-dllm supports <0.34,>=0.32" in finding.text


def test_the_command_installs_what_is_supported():
    from vllm_dllm.plugin import SUPPORTED_VLLM

    assert set(re.findall(r"[<>=]+[\d.]+", doctor_module.INSTALL_VLLM)) == set(str(SUPPORTED_VLLM).split(","))


def test_no_torch(monkeypatch):
    monkeypatch.setattr(doctor_module, "find_spec", lambda _: None)
    last = list(doctor_module.examine())[-1]
    assert (last.topic, last.level) == ("torch", "broken")


def test_not_installed_as_a_plugin(monkeypatch):
    entry_points(monkeypatch, "other")
    assert doctor_module.plugin().level == "broken"
    assert "in a checkout `make setup`" in doctor_module.plugin().text


@pytest.mark.parametrize(
    ("allowed", "mend"), [("other", "export VLLM_PLUGINS=other,dllm`"), ("", "export VLLM_PLUGINS=dllm`")]
)
def test_plugins_that_leave_ours_out(monkeypatch, allowed, mend):
    entry_points(monkeypatch, "dllm")
    monkeypatch.setenv("VLLM_PLUGINS", allowed)
    finding = doctor_module.plugin()
    assert finding.level == "broken"
    assert f"VLLM_PLUGINS is {allowed!r}" in finding.text
    assert mend in finding.text


def test_no_library(monkeypatch):
    def missing() -> None:
        raise KernelUnavailable("the ops are not built; build them: `make setup`")

    monkeypatch.setattr(load, "load_once", missing)
    assert list(doctor_module.kernels()) == [
        Finding("native ops", "the ops are not built; build them: `make setup`", "missing")
    ]


@pytest.mark.parametrize(
    ("archs", "capabilities", "level", "text"),
    [
        (["80", "90a"], [], "ok", "compiled for 80, 90a"),
        (["80", "90a"], [(9, 0), (12, 0)], "ok", "compiled for 80, 90a"),
        (["90a"], [(9, 0), (8, 0)], "missing", "CMAKE_ARGS=-DCMAKE_CUDA_ARCHITECTURES=80 `pip install"),
        ([], [(9, 0)], "missing", "not built"),
    ],
    ids=["no-gpu", "ptx-serves-later", "too-new", "cpu-build"],
)
def test_cuda_kernels_and_gpus(archs, capabilities, level, text):
    (finding,) = cuda_kernels(archs, capabilities)
    assert finding.level == level
    assert text in finding.text


def test_no_word_of_cuda_where_there_is_none():
    assert list(cuda_kernels([], [])) == []


@pytest.mark.parametrize(
    ("arch", "runs", "fails"),
    [
        ("80", [(8, 0), (8, 9), (9, 0), (12, 0)], [(7, 5)]),
        ("86-real", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("90a", [(9, 0)], [(8, 0), (10, 0)]),
        ("90a-real", [(9, 0)], [(8, 0), (10, 0)]),
        ("100f", [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
    ],
)
def test_what_an_architecture_runs_on(arch, runs, fails):
    assert [capability for capability in [*runs, *fails] if runs_on(arch, capability)] == runs


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_attention_on_a_cpu(monkeypatch):
    assert find("attention flashinfer") == []
    (chosen,) = find("attention")
    assert chosen.level == "ok"
    assert re.fullmatch(r"auto takes csrc \(\w+\) for bfloat16 and heads of 128", chosen.text)


def test_the_self_test_is_a_table(monkeypatch):
    monkeypatch.setattr(doctor_module, "examine", lambda: [Finding("torch", "9")])
    asked = []

    def run(request: Request) -> list[Check]:
        asked.append(request)
        kernel = "vocab_stats" if request.attention is None else f"attention {request.attention[0]}"
        return [Check(kernel, "a case", float("nan") if kernel == "attention torch" else 0.002, 0.01)]

    monkeypatch.setattr(isolated, "run_isolated", run)
    result = CliRunner().invoke(app, ["doctor", "--self-test"])
    assert result.exit_code == 1
    assert re.search(r"^ok +vocab_stats +a case: error 0.002, allowed 0.01$", result.stdout, re.MULTILINE)
    assert re.search(r"^ok +attention csrc +a case: error 0.002, allowed 0.01$", result.stdout, re.MULTILINE)
    assert re.search(r"^broken +attention torch +a case: error nan, allowed 0.01$", result.stdout, re.MULTILINE)
    assert {request.device_type for request in asked} == {"cuda" if torch.cuda.is_available() else "cpu"}
    heads = [(r.attention[1].num_kv_heads, r.attention[1].block_length) for r in asked if r.attention]
    assert heads == [(32, 32), (8, 4)] * (len(heads) // 2)
