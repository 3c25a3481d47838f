"""Quantised copies that `examples/quantise.py` writes, and the layouts of published GPTQ exports, by vLLM's loaders."""

import json
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.models.in_process import LLADA, SDAR, make_model, read_config, reference_of, vllm_alone
from vllm_dllm.errors import ConfigError

QUANTISE = runpy.run_path(str(Path(__file__).parents[2] / "examples/quantise.py"))
# Kernels for int4 take multiples of 32, and groups of inputs are of 64.
WIDE = {
    "llada": LLADA | {"d_model": 64, "mlp_hidden_size": 128},
    "sdar": SDAR | {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128},
}
FORMATS = ("gptq-int4", "int8", "fp8")
GPTQMODEL = {
    "bits": 4,
    "dynamic": None,
    "group_size": 64,
    "desc_act": False,
    "sym": True,
    "lm_head": False,
    "quant_method": "gptq",
    "checkpoint_format": "gptq",
    "pack_dtype": "int32",
    "meta": {"quantizer": ["gptqmodel:2.2.0"], "damp_percent": 0.01, "true_sequential": True, "static_groups": False},
}
AUTOGPTQ = {
    "bits": 4,
    "group_size": 64,
    "damp_percent": 0.1,
    "desc_act": False,
    "static_groups": False,
    "sym": True,
    "true_sequential": True,
    "model_name_or_path": None,
    "model_file_base_name": None,
    "quant_method": "gptq",
    "checkpoint_format": "gptq",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for checkpoints, in a process that can make models."""
    path = tmp_path_factory.mktemp("formats")
    with vllm_alone(path):
        yield path


def write(family: str, name: str, folder: Path) -> dict[str, Tensor]:
    """Write a random checkpoint and its quantised copy, `folder/copy`; returns the copy's tensors."""
    source, target = folder / "source", folder / "copy"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(WIDE[family]))
    save_file(reference_of(WIDE[family], folder).state_dict(), source / "model.safetensors")
    QUANTISE["write"](source, target, name)
    return load_file(target / "model.safetensors")


def model_of(folder: Path, layout: dict[str, Any] | None = None) -> Any:
    """Return our model of a quantised checkpoint as vLLM makes it, without weights."""
    from vllm.model_executor.layers.quantization import get_quantization_config
    from vllm.model_executor.model_loader.utils import configure_quant_config
    from vllm.model_executor.models import ModelRegistry

    content = json.loads((folder / "config.json").read_text())
    config = read_config(folder, content | {"quantization_config": layout or content["quantization_config"]}).hf_config
    name = {"gptq": "auto_gptq"}.get(*[config.quantization_config["quant_method"]] * 2)
    method = get_quantization_config(name).from_config(config.quantization_config)
    method.maybe_update_config(str(folder), hf_config=config)
    configure_quant_config(method, ModelRegistry._try_load_model_cls(config.architectures[0]))
    return make_model(config, method)


@pytest.mark.parametrize("family", WIDE)
@pytest.mark.parametrize("name", FORMATS)
def test_a_quantised_copy_is_loaded_under_published_names(family: str, name: str, tmp_path: Path, folder: Path) -> None:
    tensors = write(family, name, tmp_path)
    model = model_of(tmp_path / "copy")
    loaded = model.load_weights(tensors.items())
    quantised = {"gptq-int4": "qweight"}.get(name, "weight_scale")
    modules = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    assert {f"model.layers.{i}.{module}.{quantised}" for i in range(2) for module in modules} <= loaded
    gone = next(key for key in tensors if key.endswith(quantised))
    with pytest.raises(ConfigError, match=f"1 missing: {gone}"):
        model_of(tmp_path / "copy").load_weights((key, tensor) for key, tensor in tensors.items() if key != gone)


def unpacked(found: dict[str, Tensor], num_inputs: int) -> Tensor:
    """Return what int4 tensors stand for, [num_outputs, num_inputs], as GPTQ's own code unpacks them."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    numbers = (found["qweight"][:, None] >> shifts[:, None] & 15).reshape(num_inputs, -1)
    zeros = (found["qzeros"][:, :, None] >> shifts & 15).flatten(1) + 1
    groups = found["g_idx"].long()
    return ((numbers - zeros[groups]) * found["scales"].float()[groups]).T


@pytest.mark.parametrize("name", FORMATS)
def test_weights_are_rounded_to_the_nearest(name: str) -> None:
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(3))
    weight[0] = 0
    found = QUANTISE["FORMATS"][name][0](weight)
    if name == "gptq-int4":
        back, step = unpacked(found, 128), found["scales"].float().T.repeat_interleave(64, 1)
    else:
        back = found["weight"].float() * found["weight_scale"]
        step = found["weight_scale"] * (1.0 if name == "int8" else 32.0)  # of fp8: 32 between its largest numbers
    assert ((back - weight).abs() <= step * 0.501).all()
    assert (back - weight).abs().max() > 0


MODULES = [["q_proj", "k_proj", "v_proj"], ["attn_out"], ["ff_proj", "up_proj"], ["ff_out"]]
LAYOUTS = {
    "gptqmodel": GPTQMODEL,
    "auto-gptq": AUTOGPTQ,
    "optimum": AUTOGPTQ | {"modules_in_block_to_quantize": MODULES, "block_name_to_quantize": None},
    "optimum, one list": AUTOGPTQ | {"modules_in_block_to_quantize": [name for part in MODULES for name in part]},
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_of_published_exports(layout: dict[str, Any], tmp_path: Path, folder: Path) -> None:
    """As those of LLaDA-8B: `quantization_config` in config.json, and the same as quantize_config.json."""
    tensors = write("llada", "gptq-int4", tmp_path)
    (tmp_path / "copy/quantize_config.json").write_text(json.dumps(layout))
    model = model_of(tmp_path / "copy", layout)
    model.load_weights(tensors.items())
    published = {name.rpartition(".")[0] for name in tensors if name.endswith(".qweight")}
    assert len(published) == 2 * 7
    assert {name.removeprefix("model.transformer.blocks.0.") for name in published if ".0." in name} == {
        *("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")
    }
    with pytest.raises(ConfigError, match=r"1 missing: model\.transformer\.blocks\.1\.ff_out\.scales"):
        model_of(tmp_path / "copy", layout).load_weights(
            (name, tensor) for name, tensor in tensors.items() if name != "model.transformer.blocks.1.ff_out.scales"
        )
