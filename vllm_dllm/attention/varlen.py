"""FlashAttention as it ships with vLLM: packed sequences, and the rows of a forward that see nothing stored."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vllm_dllm.arrays import BoolArray, IntArray, to_device
from vllm_dllm.attention.interface import Heads, Setting, Support
from vllm_dllm.attention.layout import ForwardLayout, HostLayout
from vllm_dllm.errors import KernelUnavailable

SUPPORT = Support(
    device_types={"cuda"},
    dtypes={torch.float16, torch.bfloat16},
    head_dims=range(32, 257, 8),
    page_sizes=range(16, 1025, 16),
    casts_cache=False,
    cuda_graphs=False,
    least_capability=(8, 0),
)

LEAST_ROWS = 64
"""Rows of a request without context from which on FlashAttention takes them: fewer are one tile of our own kernel."""


def missing() -> str | None:
    """Return None if the installed vLLM has the library's files; nothing is imported."""
    spec = find_spec("vllm")
    folders = (spec.submodule_search_locations if spec else None) or []
    if any(next(Path(folder).glob("vllm_flash_attn/_vllm_fa2_C*"), None) for folder in folders):
        return None
    return "the installed vLLM has no FlashAttention; install its CUDA build: `pip install vllm`"


def version(head_dim: int) -> int | str:
    """Return the version that serves heads of a size, 2 or 3, or why none does, as a clause.

    The library is loaded, which initialises no device.
    """
    try:
        library = import_module("vllm.vllm_flash_attn")
        of_vllm = import_module("vllm.v1.attention.backends.fa_utils").get_flash_attn_version(head_size=head_dim)
    except (ImportError, OSError) as error:  # built for another torch or CUDA, or broken
        return f"vLLM's FlashAttention does not load ({error}); reinstall vLLM: `pip install --force-reinstall vllm`"
    chosen = 3 if of_vllm == 3 else 2  # the fourth asks for pages of its own
    reason = library.fa_version_unsupported_reason(chosen)
    if of_vllm is None or reason:
        why = reason or "see what vLLM logged"
        return f"vLLM's FlashAttention does not work here with heads of {head_dim} ({why}); reinstall vLLM"
    return chosen


def unavailable(head_dim: int) -> str | None:
    """Return why the library cannot be called for heads of a size, as a clause; None if it can."""
    found = missing() or version(head_dim)
    return found if isinstance(found, str) else None


def refusal(setting: Setting) -> str | None:
    """Return why rows without context are not given to it, as a clause; None if they are."""
    return SUPPORT.refusal(setting) or unavailable(setting.head_dim)


class VarlenAttention:
    """FlashAttention of packed sequences.

    Args:
        heads: of the model.

    Raises: KernelUnavailable as `version` says.
    """

    def __init__(self, heads: Heads) -> None:
        found = version(heads.head_dim)
        if isinstance(found, str):
            raise KernelUnavailable(found)
        self.version = found
        self.function: Callable[..., Any] = import_module("vllm.vllm_flash_attn").flash_attn_varlen_func
        self.scale = heads.scale

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, lengths: dict[str, Any], out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return [num_rows, num_heads, head_dim] and the natural log-sum-exp, [num_heads, num_rows].

        Args:
            query: [num_rows, num_heads, head_dim].
            key, value: [num_keys, num_kv_heads, head_dim], or pages of such, [num_pages, page_size, ...].
            lengths: which of them are a sequence's, as the library names it.
            out: as the first result, written; None: a new one.
        """
        result: tuple[Tensor, Tensor] = self.function(
            query,
            key,
            value,
            softmax_scale=self.scale,
            return_softmax_lse=True,
            fa_version=self.version,
            out=out,
            **lengths,
        )
        return result


@dataclass(frozen=True, slots=True)
class ContextFreeRun:
    """Requests side by side that see nothing stored, and their own rows alike."""

    rows: slice
    lengths: dict[str, Any]  # as `VarlenAttention` takes them


def context_free(host: HostLayout) -> BoolArray:
    """Tell which requests see nothing stored and have rows enough, [num_requests]."""
    request = np.arange(host.num_requests).repeat(np.diff(host.first_node))
    causal = np.bincount(request, host.is_causal * (host.own_len > 0), host.num_requests)
    num_nodes = np.bincount(request, host.own_len > 0, host.num_requests)
    has_context = np.bincount(request, (host.context_len > 0) & (host.own_len > 0), host.num_requests) > 0
    num_rows = np.diff(host.first_row[host.first_node])
    free: BoolArray = ~has_context & (num_rows >= LEAST_ROWS) & ((causal == 0) | (causal == num_nodes))
    return free


def context_free_runs(layout: ForwardLayout, is_free: BoolArray) -> tuple[ContextFreeRun, ...]:
    """Put neighbours together.

    Args:
        layout: of the forward.
        is_free: [num_requests], as `context_free` says.
    """
    host, device = layout.host, layout.context.device
    request = np.arange(host.num_requests).repeat(np.diff(host.first_node))
    node = np.flatnonzero(is_free[request] & (host.own_len > 0))
    is_causal = host.is_causal[node]
    begins = (np.diff(host.first_row[node]) != host.own_len[node][:-1]) | (np.diff(is_causal) != 0)
    runs = []
    for nodes in np.split(node, np.flatnonzero(begins) + 1):
        length = host.own_len[nodes].astype(np.int64)
        sums, longest = offsets(length, device), int(length.max())
        lengths = {"cu_seqlens_q": sums, "cu_seqlens_k": sums, "max_seqlen_q": longest, "max_seqlen_k": longest}
        rows = slice(int(host.first_row[nodes[0]]), int(host.first_row[nodes[-1] + 1]))
        runs.append(ContextFreeRun(rows, lengths | {"causal": bool(host.is_causal[nodes[0]])}))
    return tuple(runs)


def offsets(length: IntArray, device: torch.device) -> Tensor:
    """Return running sums of lengths, [len(length) + 1] int32."""
    return to_device(np.concatenate([[0], np.cumsum(length)]).astype(np.int32), device)
