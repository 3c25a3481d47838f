"""Random models: their tokens vary, and depend on everything they see."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from tests.e2e.questions import CHECKPOINT
from vllm_dllm.reference.model import LLaDA, LLaDAConfig


def make_wild_checkpoint(path: Path, mixing: float = 1.0, **changes: Any) -> None:
    """Write a random model with the small model's tokenizer: its tokens vary, and depend on everything it sees.

    The trained model answers most of what is not a question with EOS, whatever is wrong with its input. The less
    `mixing`, the less a position's logits depend on the others, and the more drafts come true.
    """
    config = json.loads((CHECKPOINT / "config.json").read_text())
    config |= {"d_model": 128, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "mlp_hidden_size": 96}
    config |= {"max_sequence_length": 1024, "torch_dtype": "float32", **changes}
    write_wild(path, config, lambda file: LLaDA(LLaDAConfig.from_json(file)), mixing)


def write_wild(path: Path, config: dict[str, Any], model_of: Callable[[Path], nn.Module], mixing: float) -> None:
    """Write a random model of any family.

    Args:
        path: the new folder.
        config: what its config.json says.
        model_of: makes the reference model of a config.json.
        mixing: see `make_wild_checkpoint`.
    """
    shutil.copytree(CHECKPOINT, path, ignore=shutil.ignore_patterns("*.safetensors"))
    (path / "config.json").write_text(json.dumps(config))
    model = model_of(path / "config.json")
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        is_scale = weight.dim() == 1 and name.endswith("weight")
        torch.nn.init.normal_(weight, mean=float(is_scale), std=0.3, generator=generator)
        if re.search(r"\.\d+\..*(_out|o_proj|down_proj|attention\.dense)\.weight$", name):
            weight.data *= mixing
    save_file(model.state_dict(), path / "model.safetensors", metadata={"format": "pt"})
