"""An architecture that vLLM or another plugin has a model for is served by one of them, and told."""

import inspect
from collections.abc import Iterator
from pkgutil import resolve_name
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config.diffusion import DiffusionConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
from vllm.plugins import load_general_plugins

from tests.e2e.rig import CHECKPOINT
from vllm_dllm import plugin
from vllm_dllm.engine import natives
from vllm_dllm.engine.config_hook import DllmConfigHook
from vllm_dllm.errors import ConfigError
from vllm_dllm.models.interface import FAMILIES

NATIVE = "vllm.model_executor.models.llama.LlamaForCausalLM"
BEHIND = "was registered again, as {}, behind vllm-dllm, whose model it was; .* 'dllm' is vllm-dllm"


class NativeHook(VerifyAndUpdateConfig):
    """What a model of vLLM's brings for its configuration."""


@pytest.fixture(autouse=True)
def registries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As they are in a process that has loaded its plugins, which it does once, and put back."""
    load_general_plugins()
    plugin.register()
    monkeypatch.setattr(natives, "_replaced", {})
    models, hooks = dict(ModelRegistry.models), dict(MODELS_CONFIG_MAP)
    yield
    ModelRegistry.models.update(models)
    MODELS_CONFIG_MAP.update(hooks)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is logged of others, by a logger that all of ours share."""
    messages: list[str] = []

    def info(text: str, *values: object) -> None:
        if "in the place of" in text or "diffusion_config" in text:
            messages.append(text % values)

    monkeypatch.setattr(natives.logger, "info", info)
    return messages


def engine_config() -> Any:
    args = EngineArgs(str(CHECKPOINT), max_model_len=128, load_format="dummy", dtype="float32")
    return args.create_engine_config()


def register_native(architecture: str) -> None:
    ModelRegistry.register_model(architecture, NATIVE.replace(".Llama", ":Llama"))
    MODELS_CONFIG_MAP[architecture] = NativeHook


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.architecture)
def test_ours_take_the_place_of_a_model_that_is_there(family: Any, log: list[str]) -> None:
    register_native(family.architecture)
    plugin.register()
    natives.check_model(family)
    assert MODELS_CONFIG_MAP[family.architecture] is DllmConfigHook
    plugin.register()
    natives.tell(family, SimpleNamespace(diffusion_config=None))  # type: ignore[arg-type]
    assert log == [
        f"{family.architecture} is served by vllm-dllm, in the place of {NATIVE}, which serves it where 'dllm' is not "
        "among VLLM_PLUGINS"
    ]


def test_the_start_of_an_engine_tells_it(log: list[str]) -> None:
    engine_config()
    assert log == []
    register_native("LLaDAModelLM")
    plugin.register()
    config = engine_config()
    natives.check_hook(config)
    assert [line.split(",")[0] for line in log] == ["LLaDAModelLM is served by vllm-dllm"]


@pytest.mark.parametrize("is_imported", [False, True])
def test_a_model_that_came_behind_ours_is_not_given_our_configuration(is_imported: bool) -> None:
    native = resolve_name(NATIVE.replace(".Llama", ":Llama")) if is_imported else NATIVE.replace(".Llama", ":Llama")
    ModelRegistry.register_model("LLaDAModelLM", native)
    with pytest.raises(ConfigError, match=BEHIND.format(NATIVE)):
        engine_config()


def test_our_model_is_not_made_with_another_s_configuration() -> None:
    MODELS_CONFIG_MAP["LLaDAModelLM"] = NativeHook
    config = engine_config()
    with pytest.raises(ConfigError, match=r"of LLaDAModelLM was made by tests\..*\.NativeHook, and not by vllm-dllm"):
        natives.check_hook(config)


def test_a_canvas_that_vllm_chose_is_replaced_and_told(monkeypatch: pytest.MonkeyPatch, log: list[str]) -> None:
    monkeypatch.setattr(EngineArgs, "create_diffusion_config", lambda self: DiffusionConfig(canvas_length=5))
    config = engine_config()
    assert config.diffusion_config.canvas_length == 32
    (told,) = log
    assert "canvas_length=5" in told


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.architecture)
def test_no_configuration_of_ours_has_a_canvas_length(family: Any) -> None:
    """vLLM takes a model whose configuration has one for a diffusion model of its own; ours is set by the hook."""
    config_class = resolve_name(family.config_class)
    assert "canvas_length" not in {*dir(config_class), *inspect.signature(config_class.__init__).parameters}
