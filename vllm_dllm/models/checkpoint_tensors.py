"""Which tensors a checkpoint must hold, and the comparison with what it gives while it is loaded.

vLLM loads what a checkpoint gives and keeps whatever memory held for the rest: its own count exempts linear layers and
heads, and takes one part of a fused weight for all. So every tensor is counted here, under its published name.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from vllm_dllm.errors import ConfigError
from vllm_dllm.models.checkpoint_config import CheckpointConfig

Shape = tuple[int, ...]
Sizes = dict[int, int]
"""What is known of a shape: sizes by dimension."""

# Tables that transformers once saved, and that every model class computes from config.json; and scales of an FP8
# cache, which is refused.
_UNREAD = re.compile(r"\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$|\.self_attn\.[kv]_scale$")
_NUM_NAMED = 4


def needed_tensors(config: CheckpointConfig) -> dict[str, Shape]:
    """Return the shape of every tensor of an unquantised checkpoint, by published name."""
    width = config.hidden_size
    query, kv = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    projections = {"qkv": query + 2 * kv} if config.fuses_qkv else {"q": query, "k": kv, "v": kv}
    layer: dict[str, Shape] = {
        **{f"self_attn.{part}_proj.weight": (rows, width) for part, rows in projections.items()},
        "self_attn.o_proj.weight": (width, query),
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
    }
    if config.qkv_bias:
        layer |= {f"self_attn.{part}_proj.bias": (query if part == "q" else kv,) for part in "qkv"}
    if config.qk_norm:
        layer |= {f"self_attn.{part}_norm.weight": (config.head_dim,) for part in "qk"}
    names = config.tensor_names
    layers = names.get("model.layers", "model.layers")
    needed = {
        f"{layers}.{i}.{_published(names, name)}": shape
        for i in range(config.num_hidden_layers)
        for name, shape in (layer | _feed_forward(config, i)).items()
    }
    needed[_published(names, "model.embed_tokens.weight")] = (config.vocab_size, width)
    needed[_published(names, "model.norm.weight")] = (width,)
    if not config.tie_word_embeddings:
        needed[head_name(config)] = (config.vocab_size, width)
    return needed


def _feed_forward(config: CheckpointConfig, layer: int) -> dict[str, Shape]:
    """Return the shapes of a layer's feed-forward network, or of its experts and of what chooses among them."""
    width, networks = config.hidden_size, {"mlp": config.intermediate_size}
    found: dict[str, Shape] = {}
    if config.has_experts and layer >= config.num_dense_layers:
        networks = {f"mlp.experts.{i}": config.moe_intermediate_size for i in range(config.num_experts)}
        found["mlp.gate.weight"] = (config.num_experts, width)
        if config.has_expert_bias:
            found["mlp.gate.expert_bias"] = (config.num_experts,)
        if config.shared_expert_intermediate_size:
            networks["mlp.shared_experts"] = config.shared_expert_intermediate_size
    for name, inner in networks.items():
        found |= {f"{name}.{part}_proj.weight": (inner, width) for part in ("gate", "up")}
        found[f"{name}.down_proj.weight"] = (width, inner)
    return found


def head_name(config: CheckpointConfig) -> str:
    """Return the published name of the LM head's weight."""
    return _published(config.tensor_names, "lm_head.weight")


def embedding_name(config: CheckpointConfig) -> str:
    """Return the published name of the embedding."""
    return _published(config.tensor_names, "model.embed_tokens.weight")


def _published(names: Mapping[str, str], name: str) -> str:
    module, _, leaf = name.rpartition(".")
    return f"{names.get(module, module)}.{leaf}"


@dataclass(slots=True)
class TensorCount:
    """Tensors of a checkpoint, compared with those that are needed as they come.

    Attributes:
        needed: by published name, the shape, or what is known of it where a quantisation method decides it.
        tied: names of an LM head and of the embedding that it is, where the checkpoint may give both.
        is_open: whether tensors of other names go to vLLM, whose quantisation methods have names of their own.
        is_part: whether the rest came before or comes later, as when weights are replaced in a running engine.
        passed: the name and shape of the tensor that went on last.
    """

    needed: Mapping[str, Shape | Sizes]
    tied: tuple[str, str] | None = None
    is_open: bool = False
    is_part: bool = False
    seen: Counter[str] = field(default_factory=Counter)
    unknown: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    untied: list[str] = field(default_factory=list)
    pair: dict[str, Tensor] = field(default_factory=dict)
    passed: str = ""

    def passing(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors that can be loaded.

        Raises: ConfigError, behind the last one, for what is missing, unknown, doubled or of another shape.
        """
        for name, tensor in weights:
            if self._fits(name, tensor):
                self.passed = f"{name} {list(tensor.shape)}"
                yield name, tensor
        self._raise_findings()

    def _fits(self, name: str, tensor: Tensor) -> bool:
        if _UNREAD.search(name):
            return False
        self.seen[name] += 1
        if self.tied and name in self.tied and self._is_spare_head(name, tensor):
            return False
        if name not in self.needed:
            if not self.is_open:
                self.unknown.append(name)
            return self.is_open
        shape = self.needed[name]
        if not _is_shape(tuple(tensor.shape), shape):
            self.misshapen.append(f"{name} is {list(tensor.shape)}, needed is {_show(shape)}")
            return False
        return self.seen[name] == 1

    def _is_spare_head(self, name: str, tensor: Tensor) -> bool:
        """Tell whether a tensor is the LM head of a model that takes the embedding for it, and compare the two."""
        assert self.tied is not None, "asked of tied models only"
        self.pair[name] = tensor
        if len(self.pair) == 2:
            head, embedding = self.pair.values()
            if head.dtype != embedding.dtype or not torch.equal(head, embedding):
                self.untied.append(f"{self.tied[0]} differs from {self.tied[1]}, though config.json ties them")
            self.pair = {}
        return name == self.tied[0]

    def _raise_findings(self) -> None:
        missing = [] if self.is_part else [name for name in self.needed if name not in self.seen]
        doubled = [name for name, count in self.seen.items() if count > 1]
        kinds = {
            "missing": missing,
            "unknown": self.unknown,
            "doubled": doubled,
            "of another shape": self.misshapen,
            "untied": self.untied,
        }
        findings = "; ".join(f"{len(names)} {kind}: {_first(names)}" for kind, names in kinds.items() if names)
        if findings:
            raise ConfigError(
                f"the checkpoint's tensors are not those that its config.json asks for: {findings}. Allowed are its "
                f"{len(self.needed)} tensors, each once; repair the checkpoint's files or correct config.json"
            )


def _is_shape(found: Shape, needed: Shape | Sizes) -> bool:
    if isinstance(needed, tuple):
        return found == needed
    return all(dim >= len(found) or found[dim] == size for dim, size in needed.items())


def _show(needed: Shape | Sizes) -> str:
    if isinstance(needed, tuple):
        return str(list(needed))
    return " and ".join(f"{size} in dimension {dim}" for dim, size in needed.items())


def _first(names: Sequence[str]) -> str:
    more = len(names) - _NUM_NAMED
    return ", ".join(islice(names, _NUM_NAMED)) + (f" and {more} more" if more > 0 else "")
