"""A checkpoint is served only with the tensors that its config asks for: each once, in its shape."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from tests.models.in_process import TINY, load, logits_of, make_model, read_config, reference_of, vllm_alone
from vllm_dllm.errors import ConfigError
from vllm_dllm.models.checkpoint_tensors import Shape, Sizes, TensorCount, embedding_name, head_name, needed_tensors

TIED = {"tied": TINY["sdar"] | {"tie_word_embeddings": True}, "tied llada": TINY["llada"] | {"weight_tying": True}}
CONFIGS: dict[str, dict[str, Any]] = TINY | TIED
Weights = dict[str, Tensor] | list[tuple[str, Tensor]]


@dataclass
class Checkpoint:
    """The reference of a tiny config.json, and the tensors that its checkpoint holds."""

    config: Any
    reference: nn.Module

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Name -> tensor."""
        return {name: self.reference.state_dict()[name] for name in needed_tensors(self.config)}

    def check(self, *loads: Weights) -> None:
        """Load weights one after another into a new model; assert that it then computes what the reference does."""
        model = make_model(self.config)
        for weights in loads[:-1]:
            model.load_weights(pairs(weights))
        load(model, loads[-1])  # vLLM's layers take no other weights once they have made of them what they compute with
        ids = torch.randint(0, 40, (20,), generator=torch.Generator().manual_seed(1))
        with torch.inference_mode():
            assert_close(logits_of(model, ids), self.reference(ids)[0], rtol=1e-4, atol=2e-4)

    def refuse(self, message: str, *loads: Weights, model: Any = None) -> None:
        """Assert that the last of these weights are refused."""
        model = model or make_model(self.config)
        for weights in loads[:-1]:
            model.load_weights(pairs(weights))
        with pytest.raises(ConfigError, match=message):
            model.load_weights(pairs(loads[-1]))


def pairs(weights: Weights) -> Iterable[tuple[str, Tensor]]:
    return weights.items() if isinstance(weights, dict) else weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for checkpoints, in a process that can make models."""
    path = tmp_path_factory.mktemp("tensors")
    with vllm_alone(path):
        yield path


@pytest.fixture(scope="module", params=CONFIGS)
def checkpoint(request: pytest.FixtureRequest, folder: Path) -> Checkpoint:
    """Each family, and tied heads."""
    return make(CONFIGS[request.param], folder)


def make(fields: dict[str, Any], folder: Path) -> Checkpoint:
    return Checkpoint(read_config(folder, fields).hf_config, reference_of(fields, folder))


def test_a_whole_checkpoint_is_computed_as_the_reference_does(checkpoint: Checkpoint) -> None:
    checkpoint.check(list(reversed(checkpoint.tensors.items())))


def test_each_tensor_missing_doubled_renamed_or_of_another_shape_is_refused(checkpoint: Checkpoint) -> None:
    given, model = checkpoint.tensors, make_model(checkpoint.config)
    for name, tensor in given.items():
        rest = [pair for pair in given.items() if pair[0] != name]
        wrong: dict[str, list[tuple[str, Tensor]]] = {
            rf"for: 1 missing: {re.escape(name)}\. Allowed": [],
            rf"for: 1 doubled: {re.escape(name)}\. Allowed": [(name, tensor), (name, tensor)],
            rf"for: 1 unknown: {re.escape(name)}_\. Allowed": [(name, tensor), (f"{name}_", tensor)],
            rf"1 missing: {re.escape(name)}; 1 unknown: x\.{re.escape(name)}\. Allowed": [(f"x.{name}", tensor)],
            rf"for: 1 of another shape: {re.escape(name)} is": [(name, tensor[1:])],
        }
        if tensor.dim() == 2 and tensor.shape[0] != tensor.shape[1]:
            shapes = re.escape(f"{name} is {list(tensor.T.shape)}, needed is {list(tensor.shape)}")
            wrong[f"for: 1 of another shape: {shapes}"] = [(name, tensor.T)]
        for message, instead in wrong.items():
            checkpoint.refuse(message, [*rest, *instead], model=model)


def test_biases_of_other_families_are_unknown(folder: Path) -> None:
    sdar = make(TINY["sdar"], folder)
    name = "model.layers.0.self_attn.q_proj.bias"
    sdar.refuse(f"1 unknown: {name}", sdar.tensors | {name: torch.zeros(32)})


def test_tables_that_are_computed_may_be_there(checkpoint: Checkpoint) -> None:
    tables = {f"model.layers.0.self_attn.rotary_emb.{name}": torch.ones(4) for name in ("inv_freq", "cos_cached")}
    checkpoint.check(checkpoint.tensors | tables)


@pytest.mark.parametrize("name", TIED)
def test_a_tied_head_may_be_there_where_it_is_the_embedding(name: str, folder: Path) -> None:
    tied = make(TIED[name], folder)
    head, embedding = head_name(tied.config), tied.tensors[embedding_name(tied.config)]
    tied.check(tied.tensors | {head: embedding.clone()})
    tied.refuse(rf"1 untied: {re.escape(head)} differs from", tied.tensors | {head: embedding + 1})
    tied.refuse("1 untied", {head: embedding[1:]} | tied.tensors)


def test_many_findings_are_counted_and_a_few_named(folder: Path) -> None:
    llada = make(TINY["llada"], folder)
    rest = {name: tensor for name, tensor in llada.tensors.items() if "blocks.1" not in name}
    llada.refuse(r"9 missing: (\S+, ){3}\S+ and 5 more\. Allowed are its 21 tensors", rest)


def test_weights_that_are_renewed_may_come_in_parts(checkpoint: Checkpoint) -> None:
    given = checkpoint.tensors
    zeros = {name: torch.zeros_like(tensor) for name, tensor in given.items()}
    checkpoint.check(zeros, *([pair] for pair in given.items()))
    checkpoint.refuse("1 unknown: other", given, {"other": torch.ones(2)})
    name, tensor = next(iter(given.items()))
    checkpoint.refuse("1 doubled", given, [(name, tensor), (name, tensor)])


def test_dummies_may_be_followed_by_parts(folder: Path) -> None:
    dream = make(TINY["dream"], folder)
    model = make_model(dream.config, load_format="dummy")
    model.load_weights(list(dream.tensors.items())[:2])
    dream.refuse("1 unknown: other", {"other": torch.ones(2)}, model=model)


def test_names_of_a_quantisation_method_are_counted_and_others_are_left_to_vllm() -> None:
    """Their shapes are the method's; each parameter of a layer must be there once."""
    tensors = {f"layer.{part}": torch.ones(2) for part in ("qweight", "scales", "k_scale")}
    needed: dict[str, Shape | Sizes] = {"layer.qweight": {}, "layer.scales": {}}
    assert [name for name, _ in TensorCount(needed, is_open=True).passing(tensors.items())] == list(tensors)
    with pytest.raises(ConfigError, match=r"1 missing: layer\.scales"):
        list(TensorCount(needed, is_open=True).passing([("layer.qweight", torch.ones(2))]))
    with pytest.raises(ConfigError, match=r"1 doubled: layer\.scales"):
        list(TensorCount(needed, is_open=True).passing([*tensors.items(), ("layer.scales", torch.ones(2))]))
