"""A quantised checkpoint is loaded whole, by vLLM's own methods, or refused by name."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models.in_process import TINY, load, logits_of, make_model, read_config, reference_of, vllm_alone
from vllm_dllm.errors import ConfigError

HEADS = dict.fromkeys(TINY, "lm_head") | {"llada": "model.transformer.ff_out", "nemotron": "diffusion_head"}
EXPERTS = r"re:.*\.mlp\.(experts.*|gate)$"  # vLLM has kernels for such experts on some CPUs alone
INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
W8A8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "ignore": [*sorted({*HEADS.values()}), EXPERTS],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": INT8 | {"strategy": "channel", "dynamic": False},
            "input_activations": INT8 | {"strategy": "token", "dynamic": True},
        }
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for checkpoints, in a process that can make models."""
    path = tmp_path_factory.mktemp("quantised")
    with vllm_alone(path):
        yield path


def quantised_model(family: str, folder: Path) -> Any:
    """Return our model of a family whose config.json says W8A8, without weights."""
    from vllm.model_executor.layers.quantization import get_quantization_config
    from vllm.model_executor.model_loader.utils import configure_quant_config
    from vllm.model_executor.models import ModelRegistry

    config = read_config(folder, TINY[family] | {"quantization_config": W8A8}).hf_config
    method = get_quantization_config("compressed-tensors").from_config(config.quantization_config)
    configure_quant_config(method, ModelRegistry._try_load_model_cls(config.architectures[0]))
    return make_model(config, method)


def to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return rounded rows [num, dim] and their scales [num, 1]."""
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale).round(), scale


def quantise(reference: nn.Module, head: str) -> dict[str, Tensor]:
    """Return the tensors of a W8A8 checkpoint, and make the reference compute with them."""
    tensors = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    for name, module in reference.named_modules():
        if isinstance(module, nn.Linear) and name != head and not re.search(EXPERTS.removeprefix("re:"), name):
            rounded, scale = to_int8(module.weight.data)
            tensors |= {f"{name}.weight": rounded.to(torch.int8), f"{name}.weight_scale": scale}
            module.weight.data = rounded * scale
            module.register_forward_pre_hook(lambda _, inputs: torch.mul(*to_int8(inputs[0])))
    return tensors


@pytest.mark.parametrize("family", TINY)
def test_a_quantised_checkpoint(family: str, folder: Path) -> None:
    reference = reference_of(TINY[family], folder)
    tensors = quantise(reference, HEADS[family])
    model = quantised_model(family, folder)
    load(model, list(reversed(tensors.items())))
    ids = torch.randint(0, 40, (20,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        # an activation that lies between two numbers of int8 may be rounded to the other one
        torch.testing.assert_close(logits_of(model, ids), reference(ids)[0], rtol=0.0, atol=0.1)


@pytest.mark.parametrize("every", [6, pytest.param(1, marks=pytest.mark.slow("fields"))])
@pytest.mark.parametrize("family", TINY)
def test_each_tensor_missing_doubled_renamed_or_of_another_shape_is_refused(
    family: str, every: int, folder: Path
) -> None:
    tensors = quantise(reference_of(TINY[family], folder), HEADS[family])
    for name, tensor in list(tensors.items())[::every]:
        rest = [pair for pair in tensors.items() if pair[0] != name]
        wrong: dict[str, list[tuple[str, Tensor]]] = {
            rf"1 missing: {re.escape(name)}\. Allowed": [],
            rf"1 doubled: {re.escape(name)}\. Allowed": [(name, tensor), (name, tensor)],
            rf"{re.escape(name)}_": [(name, tensor), (f"{name}_", tensor)],
            re.escape(name): [(name, torch.cat([tensor, tensor]))],
        }
        for message, instead in wrong.items():
            with pytest.raises(ConfigError, match=message):
                quantised_model(family, folder).load_weights([*rest, *instead])
