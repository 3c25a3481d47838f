"""`vllm-dllm doctor` names other plugins of the same vLLM, and those that force another model runner."""

import os
from pathlib import Path

import pytest

from vllm_dllm.cli import neighbours as module
from vllm_dllm.cli.finding import Finding
from vllm_dllm.cli.neighbours import model_runner, neighbours

PLUGINS = {
    "harmless": "def register():\n    print('hello')\n",
    "hook": "import os\ndef register():\n    os.environ['VLLM_USE_V2_MODEL_RUNNER'] = '0'\n",
    "taker": (
        "from vllm.model_executor.models import ModelRegistry\n"
        "def register():\n    ModelRegistry.register_model('DreamModel', 'taker:Dream')\n"
    ),
    "broken": "raise ImportError('no such luck')\n",
    "halfway": (
        "from vllm.model_executor.models import ModelRegistry\n"
        "def register():\n    ModelRegistry.register_model('SDARForCausalLM', 'halfway:SDAR')\n    raise OSError\n"
    ),
    "platform": "def register():\n    return 'vllm.platforms.cpu.CpuPlatform'\n",
}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of installed packages, each with a plugin of its name."""
    for name, code in PLUGINS.items():
        (tmp_path / f"{name}_plugin.py").write_text(code)
        info = tmp_path / f"{name}_plugin-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-plugin\nVersion: 1.2\n")
        group = "platform" if name == "platform" else "general"
        (info / "entry_points.txt").write_text(f"[vllm.{group}_plugins]\n{name} = {name}_plugin:register\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    return tmp_path


def test_plugins_that_force_another_runner_are_named(site: Path) -> None:
    pytest.importorskip("vllm")
    found = {finding.text.split("'")[1]: finding for finding in neighbours()}
    assert {name: finding.level for name, finding in found.items()} == {
        "harmless": "ok",
        "hook": "broken",
        "taker": "broken",
        "broken": "missing",
        "halfway": "broken",
        "platform": "broken",
    }
    assert "'hook' of hook-plugin 1.2 changes VLLM_USE_V2_MODEL_RUNNER from unset to 0" in found["hook"].text
    assert "the model of DreamModel from" in found["taker"].text
    assert "does not load (ImportError: no such luck)" in found["broken"].text
    assert "the platform to vllm.platforms.cpu.CpuPlatform" in found["platform"].text
    assert "the model of SDARForCausalLM from" in found["halfway"].text
    for name in ("hook", "taker", "platform", "broken", "halfway"):
        assert found[name].text.endswith("leave it out: `export VLLM_PLUGINS=dllm`")


def test_plugins_that_are_left_out_are_not_loaded(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "dllm")
    assert list(neighbours()) == []


def test_a_plugin_that_ends_the_process(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.sys, "executable", "/bin/false")
    (finding,) = neighbours()
    assert finding.level == "broken"
    assert "`export VLLM_PLUGINS=dllm`" in finding.text


@pytest.mark.parametrize(("value", "level"), [(None, "ok"), ("1", "ok"), ("0", "broken"), ("false", "broken")])
def test_the_variable_that_forbids_the_runner(monkeypatch: pytest.MonkeyPatch, value: str | None, level: str) -> None:
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    if value is not None:
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", value)
    finding = model_runner()
    assert isinstance(finding, Finding)
    assert finding.level == level
    assert level == "ok" or finding.text.endswith("`unset VLLM_USE_V2_MODEL_RUNNER`")
