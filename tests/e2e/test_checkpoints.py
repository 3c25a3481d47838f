"""A checkpoint that lacks a tensor, or holds one twice, is refused by name when the engine starts.

Each tensor of each family is taken out, doubled and misshapen in `tests/models/test_checkpoint_tensors.py`.
"""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.e2e.rig import engine

pytestmark = [pytest.mark.engine, pytest.mark.slow("engines")]


@pytest.mark.parametrize(
    ("family", "tensor", "named"),
    [
        ("wild", "model.transformer.ff_out.weight", r"1 missing: model\.transformer\.ff_out\.weight"),
        ("wild_sdar", "lm_head.weight", r"1 missing: lm_head\.weight"),
    ],
)
def test_missing_tensors(request: pytest.FixtureRequest, tmp_path: Path, family: str, tensor: str, named: str) -> None:
    path = tmp_path / "checkpoint"
    shutil.copytree(request.getfixturevalue(family), path)
    tensors = load_file(path / "model.safetensors")
    del tensors[tensor]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=named), engine(path, {}):
        pass


def test_a_tensor_in_two_files(wild: Path, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    shutil.copytree(wild, path)
    tensors = load_file(path / "model.safetensors")
    name = "model.transformer.ln_f.weight"
    save_file({name: tensors[name]}, path / "more.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 doubled: model\.transformer\.ln_f\.weight"), engine(path, {}):
        pass
