"""The checkpoint's own adapter: its product on rows that draft, and files that are refused by name."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from tests.models.in_process import vllm_alone
from vllm_dllm.errors import ConfigError
from vllm_dllm.models.draft_adapter import AdapterFiles, DraftAdapter, DraftRows

CONFIG = {"r": 4, "lora_alpha": 8, "target_modules": ["o_proj"], "peft_type": "LORA", "lora_dropout": 0.1}
MODULES = ["encoder.layers.0.self_attn.o_proj", "encoder.layers.1.self_attn.o_proj"]
SHAPES = {"A": (4, 12), "B": (10, 4)}


@pytest.fixture(scope="module", autouse=True)
def _alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with vllm_alone(tmp_path_factory.mktemp("adapter")):
        yield


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tensors = {
        f"base_model.model.{module}.lora_{part}.weight": torch.randn(shape)
        for module in MODULES
        for part, shape in SHAPES.items()
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    return tmp_path


@torch.no_grad()
def test_rows_that_draft_take_it_and_no_others(folder: Path) -> None:
    from vllm.model_executor.layers.linear import RowParallelLinear

    module, drafts = RowParallelLinear(12, 10, bias=False), DraftRows()
    weight = module.weight.data.normal_().clone()
    adapter = DraftAdapter(module, AdapterFiles.of(folder, "o_proj"), drafts, "adapter")
    down, up = AdapterFiles.of(folder, "o_proj").tensors(MODULES, SHAPES)[MODULES[1]]
    adapter.load(down, up)
    for linear in (module, adapter.lora_a, adapter.lora_b):
        linear.quant_method.process_weights_after_loading(linear)
    x = torch.randn(5, 12)
    plain = module(x)[0]
    assert_close(plain, x @ weight.mT)
    drafts.rows = torch.tensor([1, 4])
    adapted = module(x)[0]
    assert torch.equal(adapted[[0, 2, 3]], plain[[0, 2, 3]])
    assert_close(adapted[[1, 4]], plain[[1, 4]] + 2.0 * (x[[1, 4]] @ down.mT) @ up.mT)


def changed(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: (folder / "adapter_config.json").write_text(json.dumps(CONFIG | changes)) and None


def tensors_changed(name: str, tensor: torch.Tensor | None) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        tensors.pop(name, None)
        save_file(tensors | ({} if tensor is None else {name: tensor}), folder / "adapter_model.safetensors")

    return change


A = f"base_model.model.{MODULES[0]}.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "adapter_config.json").unlink(), "cannot be read as the configuration of an adapter"),
        (lambda folder: (folder / "adapter_config.json").write_text("[1]"), "cannot be read as the configuration"),
        (changed(r=0), "is 0, allowed is a whole number from 1 on; "),
        (changed(lora_alpha="8"), "is '8', allowed is a number; "),
        (changed(target_modules=["o_proj", "q_proj"]), "is ['o_proj', 'q_proj'], allowed is ['o_proj']"),
        (changed(use_rslora=True), "use_rslora in "),
        (changed(use_dora=True), "use_dora in "),
        (changed(alpha_pattern={"0.o_proj": 4}), "is {'0.o_proj': 4}, allowed is {}; "),
        (changed(rank_pattern={"0.o_proj": 4}), "is {'0.o_proj': 4}, allowed is {}; "),
        (lambda folder: (folder / "adapter_model.safetensors").write_text("no"), "adapter_model.safetensors cannot be"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "adapter_model.safetensors cannot be read"),
        (tensors_changed(A, None), f"lacks {A}"),
        (tensors_changed("more", torch.zeros(1)), "has more, allowed are 4 tensors"),
        (tensors_changed(A, torch.zeros(5, 12)), f"{A} in "),
    ],
)
def test_files_that_cannot_be_applied_are_refused(folder: Path, change: Callable[[Path], None], message: str) -> None:
    change(folder)
    with pytest.raises(ConfigError, match=re.escape(message)):
        AdapterFiles.of(folder, "o_proj").tensors(MODULES, SHAPES)
