"""Write a quantised copy of a checkpoint in a format that vLLM's loaders read: int4 as GPTQ has it, int8 or fp8.

Weights are rounded to the nearest number that the format has, without calibration data. The LM head, the embedding,
norms and what chooses among experts stay as they are. Needs torch and safetensors; nothing is run.
"""

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

LAYERS = (
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),  # Qwen's names
    *("attn_out", "ff_proj", "ff_out"),  # LLaDA's
)
HEADS = ("lm_head", "model.transformer.ff_out")
"""The LM head has the name of a layer in LLaDA."""
GROUP_SIZE = 64
"""Inputs that share a scale, in int4."""


def int4(weight: Tensor) -> dict[str, Tensor]:
    """Round [num_outputs, num_inputs] to -8..7 times a scale of each output and group, packed as GPTQ has them.

    Returns: by the end of its name: `qweight` [num_inputs / 8, num_outputs] int32, eight inputs in each; `scales`
        [num_groups, num_outputs] float16; `qzeros` [num_groups, num_outputs / 8] int32, of zero points less 1;
        `g_idx` [num_inputs] int32, the group of each.
    """
    num_outputs, num_inputs = weight.shape
    grouped = weight.float().view(num_outputs, -1, GROUP_SIZE)
    scales = (grouped.abs().amax(-1, keepdim=True) / 7).clamp(min=1e-8).half()
    rounded = (grouped / scales.float()).round().clamp(-8, 7).view(num_outputs, num_inputs)
    eights = (rounded + 8).to(torch.int32).T.reshape(num_inputs // 8, 8, num_outputs)
    packed = torch.zeros(num_inputs // 8, num_outputs, dtype=torch.int32)
    for place in range(8):
        packed |= eights[:, place] << (4 * place)
    num_groups = num_inputs // GROUP_SIZE
    zeros = torch.full((num_groups, num_outputs // 8), 0x77777777, dtype=torch.int32)
    groups = torch.arange(num_inputs, dtype=torch.int32) // GROUP_SIZE
    return {"qweight": packed, "scales": scales.squeeze(-1).T.contiguous(), "qzeros": zeros, "g_idx": groups}


def int8(weight: Tensor) -> dict[str, Tensor]:
    """Round [num_outputs, num_inputs] to -127..127 times a scale of each output; activations are rounded as served."""
    scale = weight.float().abs().amax(-1, keepdim=True).clamp(min=1e-8) / 127
    return {"weight": (weight.float() / scale).round().to(torch.int8), "weight_scale": scale}


def fp8(weight: Tensor) -> dict[str, Tensor]:
    """Round [num_outputs, num_inputs] to float8_e4m3fn times a scale of each output; activations as `int8`."""
    scale = weight.float().abs().amax(-1, keepdim=True).clamp(min=1e-8) / torch.finfo(torch.float8_e4m3fn).max
    return {"weight": (weight.float() / scale).to(torch.float8_e4m3fn), "weight_scale": scale}


def _compressed(num_bits: int, kind: str) -> dict[str, Any]:
    numbers = {"num_bits": num_bits, "type": kind, "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**numbers, "strategy": "channel", "dynamic": False},
        "input_activations": {**numbers, "strategy": "token", "dynamic": True},
    }
    return {
        "quant_method": "compressed-tensors",
        "format": f"{kind}-quantized",
        "ignore": [*HEADS, r"re:.*mlp\.gate$"],
        "config_groups": {"group_0": group},
    }


FORMATS: dict[str, tuple[Callable[[Tensor], dict[str, Tensor]], dict[str, Any]]] = {
    "gptq-int4": (
        int4,
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP_SIZE, "sym": True, "desc_act": False, "lm_head": False},
    ),
    "int8": (int8, _compressed(8, "int")),
    "fp8": (fp8, _compressed(8, "float")),
}
"""Name -> what makes the tensors of a layer, and `quantization_config`."""


def quantise(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint with its layers in a format; the keys are names as published."""
    make, found = FORMATS[name][0], {}
    for full, tensor in tensors.items():
        module, _, leaf = full.rpartition(".")
        if leaf == "weight" and module not in HEADS and module.rpartition(".")[2] in LAYERS:
            found |= {f"{module}.{end}": part for end, part in make(tensor).items()}
        else:
            found[full] = tensor
    return found


def write(source: Path, target: Path, name: str) -> None:
    """Write a quantised copy of a folder with a checkpoint."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"quantization_config": FORMATS[name][1]}, indent=2))
    for file in sorted(source.glob("*.safetensors")):
        save_file(quantise(load_file(file), name), target / file.name, metadata={"format": "pt"})


def main() -> None:
    """Write a quantised copy of a checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a folder with config.json and safetensors files")
    parser.add_argument("output", type=Path, help="the folder to make")
    parser.add_argument("--format", choices=FORMATS, default="gptq-int4")
    options = parser.parse_args()
    write(options.checkpoint, options.output, options.format)


if __name__ == "__main__":
    main()
