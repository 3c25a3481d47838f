"""Adapters (LoRA) of random models, as PEFT writes them, and the checkpoints that they are merged into."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

RANK = 4


def make_adapter(path: Path, checkpoint: Path, modules: tuple[str, ...], alpha: float, seed: int) -> None:
    """Write an adapter for the layers' linear modules of these published names, of small numbers at random."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in load_file(checkpoint / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] not in modules or not any(part.isdigit() for part in name.split(".")):
            continue
        scale = weight.std()  # what is written to the residual stream stays as small as it was
        for letter, shape in (("A", (RANK, weight.shape[1])), ("B", (weight.shape[0], RANK))):
            part = torch.randn(shape, generator=generator) * (scale if letter == "B" else 0.5)
            tensors[f"base_model.model.{module}.lora_{letter}.weight"] = part
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": alpha, "target_modules": list(modules), "bias": "none"}
    (path / "adapter_config.json").write_text(json.dumps(config))


def merge_adapter(path: Path, checkpoint: Path, adapter: Path) -> None:
    """Write the checkpoint with an adapter's product added to its weights."""
    shutil.copytree(checkpoint, path)
    weights, adapted = load_file(path / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    for name in [name for name in adapted if name.endswith(".lora_A.weight")]:
        product = adapted[name.replace(".lora_A.", ".lora_B.")].double() @ adapted[name].double()
        weight = weights[name.removeprefix("base_model.model.").replace(".lora_A.", ".")]
        weight += product.to(weight.dtype) * (config["lora_alpha"] / config["r"])
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def add_module(adapter: Path, module: str) -> Path:
    """Return a copy of an adapter that changes one more module, by its published name."""
    path = adapter.with_name(f"{adapter.name} and {module}")
    shutil.copytree(adapter, path, dirs_exist_ok=True)
    tensors = load_file(path / "adapter_model.safetensors")
    for letter, shape in (("A", (RANK, 8)), ("B", (8, RANK))):
        tensors[f"base_model.model.{module}.lora_{letter}.weight"] = torch.zeros(shape)
    save_file(tensors, path / "adapter_model.safetensors")
    return path
