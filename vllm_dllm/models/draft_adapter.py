"""The adapter (LoRA, arXiv:2106.09685) that a checkpoint brings along for its drafts: rows that draft take it alone.

It is the checkpoint's own, in a folder beside its weights, and changes one linear module of each layer. vLLM's adapters
are requests' own, for all of their rows, so it is a pair of linear modules here: W x + lora_alpha / r * B (A x).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import ReplicatedLinear, RowParallelLinear
from vllm.model_executor.model_loader.weight_utils import download_weights_from_hf

from vllm_dllm.engine.configs import served_family
from vllm_dllm.errors import ConfigError

logger = init_logger("vllm.dllm")

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_NAME = "base_model.model.{module}.lora_{part}.weight"
_PLAIN: dict[str, Any] = {
    "use_rslora": False,
    "use_dora": False,
    "bias": "none",
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "alpha_pattern": {},
    "rank_pattern": {},
}
"""Fields of PEFT's configuration that change the arithmetic, and the one value that is implemented."""


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """An adapter's folder, and what its configuration says."""

    folder: Path
    rank: int
    scale: float

    @classmethod
    def of(cls, folder: Path, target: str) -> "AdapterFiles":
        """Read the configuration of an adapter of the modules `target` alone. Raises: ConfigError."""
        try:
            content = json.loads((folder / CONFIG).read_text())
            rank, alpha, targets = content["r"], content["lora_alpha"], content["target_modules"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ConfigError(
                f"{folder / CONFIG} cannot be read as the configuration of an adapter ({type(error).__name__}: "
                f"{error}); allowed is PEFT's, with r, lora_alpha and target_modules; repair it, or remove the folder "
                "to draft without an adapter"
            ) from error
        targets = [targets] if isinstance(targets, str) else targets
        wrong: dict[str, tuple[object, str]] = {}
        if targets != [target]:
            wrong["target_modules"] = targets, repr([target])
        for name, value in _PLAIN.items():
            if content.get(name, value) != value:
                wrong[name] = content[name], repr(value)
        if type(rank) is not int or rank < 1:
            wrong["r"] = rank, "a whole number from 1 on"
        if type(alpha) not in (int, float):
            wrong["lora_alpha"] = alpha, "a number"
        for name, (given, allowed) in wrong.items():
            raise ConfigError(
                f"{name} in {folder / CONFIG} is {given!r}, allowed is {allowed}; remove the folder to draft without "
                "an adapter"
            )
        return cls(folder, rank, alpha / rank)

    def tensors(self, modules: list[str], shapes: dict[str, tuple[int, int]]) -> dict[str, tuple[Tensor, Tensor]]:
        """Load A and B of modules by their published names.

        Args:
            modules: names.
            shapes: of "A" and "B".

        Raises: ConfigError for tensors that are missing, unknown or of another shape.
        """
        path = self.folder / TENSORS
        try:
            given = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{path} cannot be read ({error}); repair it, or remove the folder") from error
        needed = {_NAME.format(module=module, part=part): shapes[part] for module in modules for part in "AB"}
        for name in sorted(needed.keys() ^ given.keys()):
            what = "lacks" if name in needed else "has"
            like = next(iter(needed))
            raise ConfigError(f"{path} {what} {name}, allowed are {len(needed)} tensors like {like}; repair it")
        for name, shape in needed.items():
            if tuple(given[name].shape) != shape:
                raise ConfigError(
                    f"{name} in {path} is {list(given[name].shape)}, but {list(shape)} is needed; repair it"
                )
        return {
            module: (given[_NAME.format(module=module, part="A")], given[_NAME.format(module=module, part="B")])
            for module in modules
        }


def find_adapter(vllm_config: VllmConfig, target: str) -> AdapterFiles | None:
    """Find the adapter of the served checkpoint's drafts; None where it has none, which is logged.

    Args:
        vllm_config: of the engine. A checkpoint of a hub is asked for the folder.
        target: the modules that it changes.

    Raises: ConfigError for one that cannot be applied.
    """
    model_config = vllm_config.model_config
    folder = served_family(model_config).draft_adapter
    assert folder is not None, "asked of families that may have one"
    path = Path(model_config.model)
    if not path.is_dir():
        cache = vllm_config.load_config.download_dir
        path = Path(download_weights_from_hf(model_config.model, cache, [f"{folder}/*"], model_config.revision))
    if not (path / folder).is_dir():
        logger.info("The checkpoint has no adapter in %s: drafts are made by its weights alone", folder)
        return None
    files = AdapterFiles.of(path / folder, target)
    logger.info("Drafts take the checkpoint's adapter in %s, of rank %d and scale %g", folder, files.rank, files.scale)
    return files


class DraftRows:
    """Which rows of a forward draft: [num_drafts] int64, or None; shared by the layers."""

    rows: Tensor | None = None


class DraftAdapter(nn.Module):
    """A and B of one row-parallel linear module; adds to its output by `add`, a hook of it.

    Args:
        module: that is changed.
        files: of the adapter.
        drafts: says which rows take it.
    """

    def __init__(self, module: RowParallelLinear, files: AdapterFiles, drafts: DraftRows, prefix: str) -> None:
        super().__init__()
        self.lora_a = RowParallelLinear(module.input_size, files.rank, bias=False, prefix=f"{prefix}.lora_a")
        self.lora_b = ReplicatedLinear(files.rank, module.output_size, bias=False, prefix=f"{prefix}.lora_b")
        self.scale, self.drafts = files.scale, drafts
        module.register_forward_hook(self.add)

    def add(self, _module: nn.Module, given: tuple[Tensor, ...], output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        """Add the product of the rows that draft, [num_drafts, output_size], to the module's output."""
        rows = self.drafts.rows
        if rows is None:
            return output
        product = self.lora_b(self.lora_a(given[0][rows])[0])[0]
        return output[0].index_add(0, rows, product, alpha=self.scale), output[1]

    @torch.no_grad()
    def load(self, down: Tensor, up: Tensor) -> None:
        """Load A [rank, input_size] and B [output_size, rank]."""
        for linear, weight in ((self.lora_a, down), (self.lora_b, up)):
            linear.weight.weight_loader(linear.weight, weight)
