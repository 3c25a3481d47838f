"""`additional_config.dllm.mode`: who may ask for which, and what vLLM is told."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.first_token import CONFIGS, make_wild
from vllm_dllm import plugin
from vllm_dllm.blocks import max_prompt_len, row_blocks
from vllm_dllm.engine.configs import settings_of
from vllm_dllm.engine.step_sizes import WINDOW_SCHEDULER
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
    ("changes", "message"),
    [
        ({"speculative_config": {"method": "spiffy"}}, "speculative_config is {'method': 'spiffy'}, but additional"),
        ({"spec_method": "ngram"}, "which makes drafts of its own; allowed is none; remove --speculative-config"),
        ({"async_scheduling": True}, "async_scheduling is on, but additional_config.dllm.mode is 'self_speculation'"),
        (
            {"enable_lora": True},
            "enable_lora is on, but additional_config.dllm.mode is 'self_speculation', where drafts",
        ),
    ],
)
def test_what_self_speculation_cannot_be_with(nemotron: Path, changes: dict[str, Any], message: str) -> None:
    from vllm.engine.arg_utils import EngineArgs

    plugin.register()
    settings = {"dllm": {"mode": "self_speculation"}}
    args = EngineArgs(str(nemotron), dtype="float32", max_model_len=128, additional_config=settings, **changes)
    with pytest.raises(ConfigError, match=re.escape(message)):
        args.create_engine_config()


def test_self_speculation_is_ours_and_as_long_as_autoregression(nemotron: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs

    plugin.register()
    settings = {"dllm": {"mode": "self_speculation", "block_length": 16}}
    args = EngineArgs(str(nemotron), dtype="float32", max_model_len=128, additional_config=settings)
    config = args.create_engine_config()
    assert config.scheduler_config.scheduler_cls == WINDOW_SCHEDULER
    served = settings_of(config)
    assert (served.block_length, served.mode) == (16, "self_speculation")
    assert max_prompt_len(served, 128) == 127
    assert [row_blocks(n, 60, served, 128).end for n in (5, 100, 127)] == [65, 128, 128]
    assert not len(row_blocks(128, 60, served, 128))


@pytest.mark.parametrize(
    ("settings", "changes", "message"),
    [
        ({"mode": "AR"}, {}, "mode is 'AR'; allowed are 'diffusion', 'ar' and 'self_speculation'; did you mean 'ar'?"),
        ({"mode": None}, {}, "mode is None; allowed are 'diffusion', 'ar' and 'self_speculation'; give one of these"),
        ({"mode": "self-speculation"}, {}, "did you mean 'self_speculation'?"),
        (
            {"mode": "self_speculation", "threshold": 0.9, "block_length": 16, "policy": "static"},
            {},
            "additional_config.dllm has threshold, policy beside mode 'self_speculation', which decodes "
            "autoregressively what one forward drafts; allowed are block_length and attention; remove the others or",
        ),
        ({"mode": "ar", "policy": "static"}, {}, "additional_config.dllm has policy beside mode 'ar'"),
        ({"mode": "ar"}, {"hf_overrides": lambda config: config}, "hf_overrides is a function"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    nemotron: Path, settings: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        model_config(nemotron, settings, **changes)


@pytest.mark.parametrize("mode", ["ar", "self_speculation"])
def test_a_family_that_is_trained_for_diffusion_alone_has_no_other_mode(mode: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"mode is '{mode}', but LLaDAModelLM .* '{mode}' for NemotronLabsDiffusionModel"
    ):
        model_config(LLADA, {"mode": mode})
    assert model_config(LLADA, {"mode": "diffusion", "policy": "static"}).architectures == ["LLaDAModelLM"]
