"""Registration: idempotent, and without effect where vLLM is not one we know."""

import logging
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from vllm_dllm import plugin
from vllm_dllm.engine import compat
from vllm_dllm.errors import UnsupportedVllmError

ROOT = Path(__file__).parents[2]


def test_supported_range_is_that_of_the_metadata() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert Requirement(extras["cuda"][0]).specifier == plugin.SUPPORTED_VLLM


def test_registering_again_changes_nothing() -> None:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.input_processor import InputProcessor

    plugin.register()
    before = SamplingParams._validate_diffusion, InputProcessor.process_inputs
    plugin.register()
    assert (SamplingParams._validate_diffusion, InputProcessor.process_inputs) == before


def test_a_server_of_another_model_is_not_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    class Processor:
        def __init__(self, vllm_config: str) -> None:
            self.model_config = vllm_config

    prepared: list[str] = []
    monkeypatch.setattr(compat, "InputProcessor", Processor)
    monkeypatch.setitem(sys.modules, "vllm.v1.engine.async_llm", sys)
    compat.before_serving(lambda model: model == "ours", lambda: prepared.append("server"))  # type: ignore[arg-type,return-value]
    Processor("another's")
    assert prepared == []
    Processor("ours")
    assert prepared == ["server"]


def test_architectures_are_found_without_remote_code() -> None:
    from vllm.model_executor.models import ModelRegistry

    plugin.register()
    assert {"LLaDAModelLM", "DreamModel", "SDARForCausalLM"} <= set(ModelRegistry.get_supported_archs())


def test_an_unknown_vllm_is_left_alone_and_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(plugin.importlib.metadata, "version", lambda name: "0.40.1")
    monkeypatch.setattr(plugin, "_register", lambda: pytest.fail("registered all the same"))
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level(logging.ERROR):
        plugin.register()
    assert "vLLM 0.40.1 is installed, vllm-dllm supports" in caplog.text
    assert "install a supported vLLM" in caplog.text


def test_a_name_that_vllm_lost_is_told_too(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "vllm.model_executor.models.config", None)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level(logging.ERROR):
        plugin.register()
    assert "vllm-dllm is not active" in caplog.text
    assert "vllm.model_executor.models.config" in caplog.text


def test_a_changed_method_is_named() -> None:
    class Changed:
        def validate(self, other: int) -> None: ...

    with pytest.raises(UnsupportedVllmError, match=r"Changed.validate .* needs model_config"):
        compat.wrap(Changed, "validate", ("self", "model_config"), lambda original: original)
    with pytest.raises(UnsupportedVllmError, match=r"Changed.gone .* needs self"):
        compat.wrap(Changed, "gone", ("self",), lambda original: original)
