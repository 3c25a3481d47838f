"""What the reference transformers share: normalisation, rotation, attention over kept keys and values, loading.

Shapes: `*` any leading dimensions (none when decoding, a batch when training), `len` positions of this forward,
`seq_len` positions of the sequence, `heads` query heads, `kv_heads` key heads, `dim` the size of a head.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from vllm_dllm.reference.rope import Rotation

LayerKv = tuple[Tensor, Tensor]
"""Keys (rotated) and values of one layer: two [*, kv_heads, seq_len, dim]."""


class RMSNorm(nn.Module):
    """Normalise in float32, round to the input's type, then scale."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """Map [*, size] to the same shape."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate the pairs (i, i + dim/2) of [*, heads, len, dim], in float32."""
    cos, sin = rotation
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (wide * cos + turned * sin).to(x.dtype)


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """Split [*, len, heads * dim] into [*, heads, len, dim]."""
    return x.view(*x.shape[:-1], -1, head_dim).transpose(-2, -3)


def merge_heads(x: Tensor) -> Tensor:
    """Join [*, heads, len, dim] to [*, len, heads * dim]."""
    return x.transpose(-2, -3).flatten(-2)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    start: int,
    kv: LayerKv | None,
    visible: Tensor | None = None,
    stays: Tensor | None = None,
) -> tuple[Tensor, LayerKv]:
    """Attend from positions [start, start + len) to what is kept of the others, and to themselves.

    Args:
        query: [*, heads, len, dim], rotated.
        key: [*, kv_heads, len, dim], rotated.
        value: as `key`.
        start: the first position.
        kv: keys and values of an earlier forward, from which those of all other positions are read.
        visible: [len, seq_len] bool, which positions each one sees; None: all.
        stays: [len] bool, whose keys and values are read from `kv`, too; None: nobody's.

    Returns: [*, heads, len, dim], and the keys and values of the sequence after it.
    """
    if kv is not None:
        end = start + query.shape[-2]
        if stays is not None:
            old = (each[..., start:end, :] for each in kv)
            key, value = (torch.where(stays[:, None], o, n) for o, n in zip(old, (key, value), strict=True))
        key, value = (
            torch.cat((old[..., :start, :], new, old[..., end:, :]), dim=-2)
            for old, new in zip(kv, (key, value), strict=True)
        )
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=visible, enable_gqa=True)
    return attended, (key, value)


def load_weights(model: nn.Module, folder: Path, dtype: torch.dtype) -> None:
    """Give a model on the meta device the weights of a folder's safetensors files, cast to `dtype`.

    Raises: ValueError for a tensor in two files; RuntimeError of torch for names and shapes that are not the model's.
    """
    weights: dict[str, Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        given = load_file(shard)
        if doubled := sorted(weights.keys() & given.keys()):
            message = (
                f"{doubled[0]} and {len(doubled) - 1} more are in {shard} and in a file before it; keep one of each."
            )
            raise ValueError(message)
        weights |= {name: tensor.to(dtype) for name, tensor in given.items()}
    model.load_state_dict(weights, assign=True)
