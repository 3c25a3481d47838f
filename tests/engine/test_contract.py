"""What we override, wrap and call of vLLM has the parameters we rely on: in the installed version, and in 0.33.

`signatures_0_33.json` holds the parameter names of 0.33, read from its sources, where only 0.32 is installed.
"""

import importlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vllm_dllm.engine.contracts import CONTRACTS, LORA_CONTRACTS, Contract, check_contracts, parameters_in, read_owner
from vllm_dllm.engine.patches import PATCHES
from vllm_dllm.errors import UnsupportedVllmError

RECORDED: dict[str, list[str]] = json.loads((Path(__file__).parent / "signatures_0_33.json").read_text())

STATE = "vllm.v1.worker.gpu.model_states.interface.ModelState"
ATTENTION = "vllm.v1.attention.backend"

# Ours must take what vLLM passes: the same parameters in the same order.
OVERRIDES = {
    f"{STATE}.{name}": ("vllm_dllm.engine.model_state.DllmModelState", name)
    for name in [
        *("__init__", "add_request", "apply_staged_writes", "custom_sampler", "get_supported_generation_tasks"),
        *("initialize_kv_cache", "prepare_attn", "prepare_dummy_inputs", "prepare_inputs", "prepare_inputs_embeds"),
        "preprocess_state",
    ]
} | {
    f"{ATTENTION}.AttentionImpl.__init__": ("vllm_dllm.engine.attention.DllmAttentionImpl", "__init__"),
    f"{ATTENTION}.AttentionImpl.forward": ("vllm_dllm.engine.attention.DllmAttentionImpl", "forward"),
    f"{ATTENTION}.AttentionMetadataBuilder.__init__": ("vllm_dllm.engine.attention.DllmMetadataBuilder", "__init__"),
    f"{ATTENTION}.AttentionMetadataBuilder.build": ("vllm_dllm.engine.attention.DllmMetadataBuilder", "build"),
    "vllm.model_executor.models.config.VerifyAndUpdateConfig.verify_and_update_config": (
        "vllm_dllm.engine.config_hook.DllmConfigHook",
        "verify_and_update_config",
    ),
    "vllm.model_executor.models.config.VerifyAndUpdateConfig.verify_and_update_model_config": (
        "vllm_dllm.engine.config_hook.DllmConfigHook",
        "verify_and_update_model_config",
    ),
}

SCHEDULER = "vllm.v1.core.sched.scheduler.Scheduler"

# vLLM's must take what we pass by name, and what our overrides of any signature rely on.
CALLS = {
    f"{SCHEDULER}.schedule": ["throttle_prefills"],
    f"{SCHEDULER}.update_from_output": ["scheduler_output", "model_runner_output"],
    f"{SCHEDULER}.make_stats": ["spec_decoding_stats"],
    f"{SCHEDULER}.make_spec_decoding_stats": ["num_draft_tokens", "num_accepted_tokens", "request_id"],
    f"{SCHEDULER}._free_request": ["request"],
    "vllm.v1.metrics.loggers.StatLoggerManager.__init__": ["vllm_config", "enable_default_loggers", "client_count"],
    "vllm.engine.arg_utils.EngineArgs.add_cli_args": ["parser"],
    "vllm.engine.arg_utils.EngineArgs.create_speculative_config": ["target_model_config", "target_parallel_config"],
    "vllm.sampling_params.SamplingParams._validate_diffusion": ["model_config"],
    "vllm.sampling_params.SamplingParams.update_from_generation_config": ["generation_config", "eos_token_id"],
    "vllm.v1.engine.input_processor.InputProcessor.process_inputs": ["request_id", "prompt", "params"],
    "vllm.v1.core.kv_cache_manager.KVCacheManager.allocate_slots": ["num_new_tokens", "num_lookahead_tokens"],
    "vllm.forward_context.set_forward_context": ["attn_metadata", "vllm_config", "num_tokens", "slot_mapping"],
    "vllm.model_executor.layers.attention.attention.Attention.__init__": ["num_kv_heads", "attn_backend", "prefix"],
    "vllm.model_executor.layers.rotary_embedding.get_rope": ["head_size", "max_position", "rope_parameters"],
    "vllm.model_executor.layers.logits_processor.LogitsProcessor.forward": [
        *("lm_head", "hidden_states", "skip_gather")
    ],
    "vllm.model_executor.models.utils.AutoWeightsLoader.load_weights": ["weights", "mapper"],
    "vllm.utils.torch_utils.async_tensor_h2d": ["data", "device"],
}


def find(name: str) -> Callable[..., Any]:
    parts = name.replace(":", ".").split(".")
    for length in range(len(parts) - 1, 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return inspect.unwrap(found)
    raise LookupError(name)


def parameters(name: str) -> list[str]:
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    function = find(name)
    found = inspect.signature(getattr(function, "__func__", function)).parameters.values()
    return [stars.get(parameter.kind, "") + parameter.name for parameter in found if parameter.name != "cls"]


def test_overrides_take_what_vllm_passes() -> None:
    ours = {name: parameters(".".join(override)) for name, override in OVERRIDES.items()}
    assert ours == {name: parameters(name) for name in OVERRIDES}
    assert ours == {name: RECORDED[name] for name in OVERRIDES}


def test_calls_name_existing_parameters() -> None:
    missing = {
        name: lost
        for name, needed in CALLS.items()
        if (lost := set(needed) - (set(parameters(name)) & set(RECORDED[name])))
    }
    assert not missing


def test_every_recorded_signature_is_used() -> None:
    assert set(RECORDED) == set(OVERRIDES) | set(CALLS)


OVERLOADED = """
class Other:
    def find(self, wrong): ...

class Owner(
    Other,
):
    field: int = 3

    @overload
    def find(self, name: str, *, default: None = ...) -> str: ...

    async def find(  # what it does
        self, name: str, /, other: dict[str, int] = {"a": 1}, *rest: int, default: str = ":", **more: object
    ) -> str:
        return self.made

    def __init__(self):
        self.made = 1
"""


def test_contracts_are_read_from_sources(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made/__init__.py").write_text("from .inner import Owner")
    (tmp_path / "made/inner.py").write_text(OVERLOADED)
    text = read_owner("vllm.made:Owner", tmp_path)
    assert text is not None
    assert parameters_in(text, "find") == ("self", "name", "other", "default")

    def broken(*contracts: Contract) -> str:
        with pytest.raises(UnsupportedVllmError) as error:
            check_contracts(contracts, ">=1", tmp_path)
        return str(error.value)

    good = [Contract("vllm.made:Owner", name, None) for name in ("field", "made", "find")]
    check_contracts((*good, Contract("vllm.made:Owner", "find", ("other", "default"))), ">=1", tmp_path)
    assert "Owner.find takes (self, name, other, default), and not wrong;" in broken(
        Contract("vllm.made:Owner", "find", ("wrong",))
    )
    gone = broken(Contract("vllm.made:Owner", "lost", None), Contract("vllm.made:Nobody", "x", None), *good)
    assert "Owner.lost is gone; there is no vllm.made:Nobody; supported are the releases >=1" in gone


def test_what_is_read_is_what_python_sees() -> None:
    contracts = [*CONTRACTS, *LORA_CONTRACTS, *(patch.contract for patch in PATCHES.values())]
    for contract in contracts:
        if contract.parameters and not contract.owner.startswith("vllm.entrypoints"):
            text = read_owner(contract.owner)
            assert text is not None
            function = find(f"{contract.owner}.{contract.attribute}")
            function = getattr(function, "fget", getattr(function, "__func__", function))
            kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
            expected = [p.name for p in inspect.signature(function).parameters.values() if p.kind not in kinds]
            assert list(parameters_in(text, contract.attribute) or ()) == expected
