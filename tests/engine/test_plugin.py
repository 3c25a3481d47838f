"""Registration: idempotent, and without effect where vLLM is not one we know."""

import logging
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from vllm.config import VllmConfig

from vllm_dllm import plugin
from vllm_dllm.engine import configs, contracts, front_end
from vllm_dllm.engine.contracts import Contract
from vllm_dllm.engine.patches import become

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
    from vllm.v1.engine.input_processor import InputProcessor

    prepared: list[str] = []
    monkeypatch.setattr(front_end, "is_ours", lambda model: model == "ours")
    monkeypatch.setattr(front_end.serving, "install", lambda: prepared.append("server"))
    monkeypatch.setitem(sys.modules, "vllm.v1.engine.async_llm", sys)
    processor = object.__new__(InputProcessor)
    processor.model_config = "another's"  # type: ignore[assignment]
    front_end.take_over(processor)
    assert (prepared, type(processor)) == ([], InputProcessor)
    processor.model_config = "ours"  # type: ignore[assignment]
    front_end.take_over(processor)
    assert (prepared, type(processor)) == (["server"], front_end.DllmInputProcessor)


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


def test_nothing_is_changed_where_one_contract_is_broken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = [
        Contract("vllm.sampling_params:SamplingParams", "_validate_diffusion", ("self", "canvas")),
        Contract("vllm.v1.outputs:ModelRunnerOutput", "plugin_output", None),
    ]
    monkeypatch.setattr(contracts, "CONTRACTS", (*contracts.CONTRACTS, *broken))
    monkeypatch.setattr(plugin, "_import_all", lambda: pytest.fail("went on all the same"))
    monkeypatch.setattr(plugin, "_register", lambda: pytest.fail("registered all the same"))
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    plugin._check_names.cache_clear()
    with caplog.at_level(logging.ERROR):
        plugin.register()
    (said,) = set(caplog.messages)  # handlers of other tests of the process may be there
    assert "SamplingParams._validate_diffusion takes (self, model_config), and not canvas" in said
    assert "ModelRunnerOutput.plugin_output is gone" in said
    assert str(plugin.SUPPORTED_VLLM) in said


def test_another_model_s_configuration_stays_what_it_is() -> None:
    config = VllmConfig()
    assert type(config) is VllmConfig
    with pytest.raises(TypeError, match="is no"):
        become(config, configs.DllmSchedulerConfig)
