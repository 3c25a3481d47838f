"""Models with experts: names that files cut short or quantise, ranks that share experts, and what is refused."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tests.models.in_process import TINY, load, logits_of, make_model, read_config, reference_of, vllm_alone
from vllm_dllm.errors import ConfigError
from vllm_dllm.plugin import register

FAMILIES = ("llada_moe", "sdar_moe", "llada2")
IDS = torch.randint(0, 40, (30,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for checkpoints, in a process that can make models."""
    path = tmp_path_factory.mktemp("experts")
    with vllm_alone(path):
        yield path


@pytest.mark.parametrize("cut", [("layers",), ("layers", "embed_tokens", "norm")])
def test_sdar_moe_is_served_from_files_without_the_prefix(cut: tuple[str, ...], folder: Path) -> None:
    reference = reference_of(TINY["sdar_moe"], folder)
    starts = tuple(f"model.{name}." for name in cut)
    tensors = {
        name.removeprefix("model.") if name.startswith(starts) else name: tensor
        for name, tensor in reference.state_dict().items()
    }
    config = read_config(folder, TINY["sdar_moe"]).hf_config
    model = make_model(config)
    load(model, tensors)
    with torch.inference_mode():
        assert_close(logits_of(model, IDS), reference(IDS)[0], rtol=1e-4, atol=2e-4)
    both = [*tensors.items(), *((name, tensor) for name, tensor in reference.state_dict().items() if "norm.w" in name)]
    with pytest.raises(ConfigError, match=r"doubled: model\.layers\.0\."):
        make_model(config).load_weights(both)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_is_routed_alike_in_any_batch(family: str, folder: Path) -> None:
    """Nearly: kernels add in another order for another number of rows."""
    model = make_model(read_config(folder, TINY[family]).hf_config)
    load(model, reference_of(TINY[family], folder).state_dict())
    mlp = model.model.layers[1].mlp
    rows = torch.randn(64, 32, generator=torch.Generator().manual_seed(2))
    from vllm.forward_context import set_forward_context

    with torch.inference_mode(), set_forward_context(None, model.current_config):
        together = mlp(rows.clone())
        assert_close(torch.cat([mlp(row[None].clone()) for row in rows]), together, rtol=1e-5, atol=1e-6)
        assert_close(mlp(rows.flip(0)).flip(0), together, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_tensor_of_quantised_experts_is_counted(family: str, folder: Path) -> None:
    model = make_model(read_config(folder, TINY[family]).hf_config)
    for layer in [layer for layer in model.model.layers if hasattr(layer.mlp, "experts")]:
        experts = layer.mlp.experts.routed_experts
        experts._modules.clear()
        experts._parameters.clear()
        names = ("qweight", "scales", "qzeros", "g_idx", "g_idx_sort_indices")
        for name in (f"{part}_{name}" for part in ("w13", "w2") for name in names):
            experts.register_parameter(name, nn.Parameter(torch.zeros(1), requires_grad=False))
        experts.quant_method = SimpleNamespace()
    needed = model._needed_tensors()
    of_expert = {name for name in needed if name.startswith("model.layers.1.mlp.experts.5.")}
    assert of_expert == {
        f"model.layers.1.mlp.experts.5.{part}_proj.{leaf}"
        for part in ("gate", "up", "down")
        for leaf in ("qweight", "scales", "qzeros")
    }
    assert needed["model.layers.1.mlp.gate.weight"] == (TINY[family]["num_experts"], 32)


def test_a_rank_computes_with_its_own_experts_alone() -> None:
    """The map's place is that of vLLM's kernel, which does not read it."""
    from vllm_dllm.engine.cpu.experts import _apply_own

    given: dict[str, Any] = {}
    _apply_own(
        partial(given.update),
        topk_weights=torch.tensor([[0.5, 0.25], [0.125, 0.5]]),
        topk_ids=torch.tensor([[3, 0], [2, 1]]),
        expert_map=torch.tensor([-1, 1, -1, 0]),
        output="kept",
    )
    assert given["topk_ids"].tolist() == [[0, 0], [0, 1]]
    assert given["topk_weights"].tolist() == [[0.5, 0.0], [0.0, 0.5]]
    assert (given["output"], given["expert_map"]) == ("kept", None)


def test_why_engines_share_no_experts_on_a_cpu() -> None:
    """Once vLLM has this exchange there, the refusal of --data-parallel-size is to be looked at again."""
    from vllm.distributed.device_communicators.base_device_communicator import DeviceCommunicatorBase
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    for name in ("all_gatherv", "reduce_scatterv"):
        assert getattr(CpuCommunicator, name) is getattr(DeviceCommunicatorBase, name)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"enable_lora": True}, "enable_lora is on, but adapters of models with experts"),
        ({"data_parallel_size": 2}, "data_parallel_size is 2, but engines that share their experts exchange"),
    ],
)
def test_what_experts_cannot_do_is_refused(family: str, changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs

    register()
    (tmp_path / "config.json").write_text(json.dumps(TINY[family]))
    with pytest.raises(ConfigError, match=f"^{sentence}"):
        EngineArgs(model=str(tmp_path), skip_tokenizer_init=True, **changes).create_engine_config()
