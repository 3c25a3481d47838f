"""Which tensors a checkpoint must hold, and a check of those it does: by name and, unquantised, by shape.

vLLM's own tracking exempts linear layers and heads, and takes one part of a fused weight for all of it: what is missing
would be served as whatever memory held.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from vllm_dllm.errors import ConfigError

_HARMLESS = re.compile(r"\brotary(_pos)?_emb\.(inv_freq|cos_cached|sin_cached)$")
"""Tables that older code saved; they are computed."""

_KV_SCALE = re.compile(r"\bself_attn\.(attn\.)?([qkv]_scale|[kv]_zero_point|prob_scale)$")

_SHOWN = 5


def needed_tensors(config: Any) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every tensor of a model, under the shared layers' names, parts of fused weights apart.

    Args:
        config: a configuration of `models/`.
    """
    hidden, inner, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    query, key = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (query, hidden),
        "self_attn.k_proj.weight": (key, hidden),
        "self_attn.v_proj.weight": (key, hidden),
        "self_attn.o_proj.weight": (hidden, query),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    if config.qkv_bias:
        layer |= {f"self_attn.{name}_proj.bias": (size,) for name, size in (("q", query), ("k", key), ("v", key))}
    if config.qk_norm:
        layer |= {"self_attn.q_norm.weight": (head_dim,), "self_attn.k_norm.weight": (head_dim,)}
    needed: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tie_word_embeddings:
        needed["lm_head.weight"] = (config.vocab_size, hidden)
    for i in range(config.num_hidden_layers):
        needed |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return needed


def checked_tensors(
    weights: Iterable[tuple[str, str, Tensor]],
    needed: dict[str, tuple[int, ...]],
    *,
    is_quantised: bool,
    is_whole: bool,
) -> Iterator[tuple[str, Tensor]]:
    """Pass a checkpoint's tensors on, and refuse the checkpoint behind the last one if something is wrong with it.

    A quantised layer has tensors of other names and shapes in the place of its weight: of each layer at least one must
    be there.

    Args:
        weights: (name in the checkpoint, name of the shared layers, tensor), whole on every tensor-parallel rank.
        needed: of `needed_tensors`.
        is_quantised: whether the checkpoint's layers are.
        is_whole: whether these are all tensors, so that one that is not there is missing.

    Yields: (name in the checkpoint, tensor); misshapen, doubled and unknown ones are left out.

    Raises: ConfigError that names what is missing, doubled, unknown or misshapen.
    """
    is_tied = "lm_head.weight" not in needed
    owners = {name.rpartition(".")[0] for name in needed}
    seen: set[str] = set()
    wrong: dict[str, list[str]] = {"missing": [], "doubled": [], "unknown": [], "misshapen": []}
    for published, name, tensor in weights:
        if _HARMLESS.search(name) or (is_tied and name == "lm_head.weight"):
            continue  # a tied head is the embedding, whatever the file repeats
        is_layer = is_quantised and (name.rpartition(".")[0] in owners or _KV_SCALE.search(name))
        if name in seen:
            wrong["doubled"].append(published)
        elif name not in needed and not is_layer:
            wrong["unknown"].append(published)
        elif not is_quantised and tuple(tensor.shape) != needed[name]:
            wrong["misshapen"].append(f"{published} {tuple(tensor.shape)} instead of {needed[name]}")
        else:
            seen.add(name)
            yield published, tensor
        seen.add(name)
    if is_whole:
        found = {name.rpartition(".")[0] for name in seen} if is_quantised else seen
        wrong["missing"] = [name for name in needed if (name.rpartition(".")[0] if is_quantised else name) not in found]
    if any(wrong.values()):
        raise ConfigError(_explain(wrong))


def _explain(wrong: dict[str, list[str]]) -> str:
    parts = [
        f"{len(names)} {kind}: {', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''}"
        for kind, names in wrong.items()
        if names
    ]
    return (
        f"the checkpoint's tensors are not those that its config.json asks for; {'; '.join(parts)}; allowed are each "
        "tensor of the model once; download the checkpoint again, or convert it anew"
    )
