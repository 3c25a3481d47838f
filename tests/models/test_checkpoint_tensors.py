"""A checkpoint is served only with the tensors that its config asks for: each once, in its shape."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from vllm_dllm.errors import ConfigError
from vllm_dllm.models.checkpoint_tensors import checked_tensors, needed_tensors
from vllm_dllm.models.dream_config import DreamConfig
from vllm_dllm.models.llada import LLaDAModelLM
from vllm_dllm.models.llada_config import LLaDAConfig
from vllm_dllm.models.sdar_config import SDARConfig
from vllm_dllm.models.transformer import MaskedDiffusionLM

_QWEN = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 40,
    "vocab_size": 50,
    "mask_token_id": 3,
}
_LLADA = {"d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "mlp_hidden_size": 40, "vocab_size": 50}
CONFIGS: dict[str, Any] = {
    "llada": LLaDAConfig(**_LLADA, mask_token_id=3),
    "dream": DreamConfig(**_QWEN),
    "sdar": SDARConfig(**_QWEN),
    "tied": SDARConfig(**_QWEN, tie_word_embeddings=True),
}


def tensors(config: Any) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in needed_tensors(config).items()}


def load(config: Any, given: list[tuple[str, Tensor]], **options: Any) -> list[str]:
    options = {"is_quantised": False, "is_whole": True} | options
    weights = ((name, name, tensor) for name, tensor in given)
    return [name for name, _ in checked_tensors(weights, needed_tensors(config), **options)]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_whole_checkpoint_passes(config: Any) -> None:
    given = tensors(config)
    assert load(config, list(given.items())) == list(given)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_each_tensor_must_be_there_once_in_its_shape(config: Any) -> None:
    given = tensors(config)
    changes: dict[str, Callable[[str, Tensor], list[tuple[str, Tensor]]]] = {
        "missing": lambda name, tensor: [],
        "doubled": lambda name, tensor: [(name, tensor), (name, tensor)],
        "unknown": lambda name, tensor: [(name, tensor), (f"{name}_", tensor)],
        "misshapen": lambda name, tensor: [(name, torch.empty((*tensor.shape[::-1], 1), device="meta"))],
    }
    for kind, change in changes.items():
        for name in given:
            wrong = [pair for n, t in given.items() for pair in (change(n, t) if n == name else [(n, t)])]
            with pytest.raises(ConfigError, match=rf"1 {kind}: {re.escape(name)}"):
                load(config, wrong)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_transposed_weights_are_refused(config: Any) -> None:
    """But for square ones, which no shape tells."""
    given, refused = tensors(config), 0
    for name, tensor in given.items():
        if tensor.dim() == 2 and tensor.shape[0] != tensor.shape[1]:
            with pytest.raises(ConfigError, match=rf"1 misshapen: {re.escape(name)}"):
                load(config, list((given | {name: tensor.T}).items()))
            refused += 1
    assert refused > 5


def test_what_is_computed_or_tied_may_be_there() -> None:
    given = [*tensors(CONFIGS["tied"]).items()]
    extra = [("model.layers.0.self_attn.rotary_emb.inv_freq", torch.empty(4)), ("lm_head.weight", torch.empty(50, 24))]
    assert load(CONFIGS["tied"], given + extra) == [name for name, _ in given]


def test_quantised_layers_have_tensors_of_their_own_names() -> None:
    config = CONFIGS["sdar"]
    given = {}
    for name, tensor in tensors(config).items():
        if "_proj" in name:
            given |= {name.replace(".weight", f".{part}"): tensor for part in ("qweight", "qzeros", "scales", "g_idx")}
        else:
            given[name] = tensor
    given["model.layers.0.self_attn.k_scale"] = torch.empty(1)
    assert load(config, list(given.items()), is_quantised=True) == list(given)
    rest = [pair for pair in given.items() if "layers.1.mlp.up_proj" not in pair[0]]
    with pytest.raises(ConfigError, match=r"1 missing: model\.layers\.1\.mlp\.up_proj\.weight"):
        load(config, rest, is_quantised=True)


def test_weights_that_are_renewed_may_be_a_part() -> None:
    config = CONFIGS["dream"]
    part = list(tensors(config).items())[:3]
    assert load(config, part, is_whole=False) == [name for name, _ in part]


def test_published_names_are_those_of_the_shared_layers() -> None:
    rename = LLaDAModelLM.hf_to_vllm_mapper.get_rename_mapper()
    block = "model.transformer.blocks.1"
    assert rename.apply_list(
        [f"{block}.q_proj.weight", f"{block}.ff_out.weight", "model.transformer.ff_out.weight"]
    ) == [
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
        "lm_head.weight",
    ]
    names = list(needed_tensors(CONFIGS["sdar"]))
    assert MaskedDiffusionLM.hf_to_vllm_mapper.get_rename_mapper().apply_list(names) == names
