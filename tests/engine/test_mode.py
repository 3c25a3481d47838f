"""`additional_config.dllm.mode`: who may ask for which, and what vLLM is told."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.first_token import CONFIGS, make_wild
from vllm_dllm import plugin
from vllm_dllm.errors import ConfigError

LLADA = Path(__file__).parents[2] / "examples/tiny_llada/checkpoint"


@pytest.fixture(scope="module")
def nemotron(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("nemotron") / "checkpoint"
    make_wild("nemotron", path)
    return path


def model_config(path: Path, settings: dict[str, Any], **changes: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    plugin.register()
    args = EngineArgs(str(path), dtype="float32", additional_config={"dllm": settings}, **changes)
    found = args.create_model_config()
    assert args.hf_overrides == changes.get("hf_overrides", {}), "what the user gave is changed"
    return found


def test_ar_is_another_architecture_of_the_same_checkpoint(nemotron: Path) -> None:
    overrides = {"max_position_embeddings": 128}
    config = model_config(nemotron, {"mode": "ar"}, hf_overrides=overrides)
    assert config.architectures == ["NemotronLabsDiffusionForCausalLM"]
    assert config.hf_config.max_position_embeddings == 128
    assert not hasattr(config.hf_config, "canvas_length")
    assert config.is_chunked_prefill_supported
    for settings in ({}, {"mode": "diffusion"}):
        assert model_config(nemotron, settings).architectures == CONFIGS["nemotron"]["architectures"]


@pytest.mark.parametrize(
    ("settings", "changes", "message"),
    [
        (
            {"mode": "self_speculation"},
            {},
            "mode is 'self_speculation', which is not implemented yet; allowed are 'diff",
        ),
        ({"mode": "AR"}, {}, "mode is 'AR'; allowed are 'diffusion' and 'ar'; did you mean 'ar'?"),
        ({"mode": None}, {}, "mode is None; allowed are 'diffusion' and 'ar'; give one of these"),
        ({"mode": "ar", "policy": "static"}, {}, "additional_config.dllm has policy beside mode 'ar'"),
        ({"mode": "ar"}, {"hf_overrides": lambda config: config}, "hf_overrides is a function"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    nemotron: Path, settings: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        model_config(nemotron, settings, **changes)


def test_a_family_that_is_trained_for_diffusion_alone_has_no_ar() -> None:
    with pytest.raises(ConfigError, match=r"mode is 'ar', but LLaDAModelLM .* 'ar' for NemotronLabsDiffusionModel"):
        model_config(LLADA, {"mode": "ar"})
    assert model_config(LLADA, {"mode": "diffusion", "policy": "static"}).architectures == ["LLaDAModelLM"]
