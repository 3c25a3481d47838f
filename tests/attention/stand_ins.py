"""Stand-ins for libraries: what their documentation says of the calls that we make, in plain torch on a CPU."""

import math
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor


def attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float, *, is_causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Attend from all rows [n, heads, d] to all keys [m, heads, d]; the output and its natural log-sum-exp [n, heads].

    If causal, row i of n sees keys up to m - n + i. Without keys they are 0 and -inf.
    """
    scores = torch.einsum("qhd,khd->qhk", query.double(), key.double()) * scale
    if is_causal:
        is_hidden = torch.ones(len(query), len(key)).bool().triu(len(key) - len(query) + 1)
        scores.masked_fill_(is_hidden[:, None], -math.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.clamp(min=-1e300)[..., None]).exp()
    return torch.einsum("qhk,khd->qhd", weights, value.double()).to(query.dtype), lse.float()


class Ragged:
    """`BatchPrefillWithRaggedKVCacheWrapper`."""

    def __init__(self, workspace: Tensor, kv_layout: str, *, backend: str) -> None:
        assert (workspace.dtype, kv_layout, backend) == (torch.uint8, "NHD", "fa2")

    def plan(
        self, qo_indptr: Tensor, kv_indptr: Tensor, *, num_qo_heads: int, num_kv_heads: int, **numbers: Any
    ) -> None:
        assert qo_indptr.dtype == kv_indptr.dtype == torch.int32
        self.is_causal = numbers.pop("causal")
        assert numbers.pop("disable_split_kv")
        assert numbers.keys() == {"head_dim_qk", "sm_scale", "q_data_type", "kv_data_type"}
        self.qo, self.kv, self.heads, self.numbers = qo_indptr.tolist(), kv_indptr.tolist(), num_qo_heads, numbers
        self.group = num_qo_heads // num_kv_heads

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, *, out: Tensor | None = None, return_lse: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        assert q.shape == (self.qo[-1], self.heads, self.numbers["head_dim_qk"])
        assert len(k) == len(v) == self.kv[-1]
        assert q.dtype == self.numbers["q_data_type"]
        assert k.dtype == v.dtype == self.numbers["kv_data_type"]
        out = torch.empty(q.shape, dtype=q.dtype) if out is None else out
        lse = torch.empty(q.shape[:2])
        for i in range(len(self.qo) - 1):
            rows, keys = slice(self.qo[i], self.qo[i + 1]), slice(self.kv[i], self.kv[i + 1])
            key, value = (part[keys].repeat_interleave(self.group, 1) for part in (k, v))
            out[rows], lse[rows] = attend(q[rows], key, value, self.numbers["sm_scale"], is_causal=self.is_causal)
        return (out, lse / math.log(2)) if return_lse else out  # its log-sum-exp has base 2


class Paged(Ragged):
    """`BatchPrefillWithPagedKVCacheWrapper`: the K/V of a group are the entries of its pages, the last one in part."""

    def plan(  # type: ignore[override]
        self,
        *,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        page_size: int,
        **numbers: Any,
    ) -> None:
        assert paged_kv_indices.dtype == paged_kv_last_page_len.dtype == torch.int32
        assert not numbers["causal"]
        num_pages = paged_kv_indptr.diff()
        length = (num_pages - 1).clamp(min=0) * page_size + paged_kv_last_page_len
        offsets = torch.nn.functional.pad(length.cumsum(0), (1, 0)).int()
        super().plan(qo_indptr, offsets, **numbers)
        self.page_size, self.indices = page_size, paged_kv_indices.long()
        assert page_size == 1, "else the entries of a last page would have to be cut here"

    def run(  # type: ignore[override]
        self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor], *, return_lse: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        k, v = paged_kv_cache
        assert k.stride() == v.stride()
        assert k.shape[1] == self.page_size
        return super().run(q, k[self.indices].flatten(0, 1), v[self.indices].flatten(0, 1), return_lse=return_lse)


def merge_state_in_place(v: Tensor, s: Tensor, v_other: Tensor, s_other: Tensor) -> None:
    assert v.is_contiguous()
    total = torch.logaddexp2(s, s_other)
    v.copy_(v * (s - total).exp2()[..., None] + v_other * (s_other - total).exp2()[..., None])
    s.copy_(total)


def flashinfer() -> ModuleType:
    module = ModuleType("flashinfer")
    module.BatchPrefillWithRaggedKVCacheWrapper = Ragged  # type: ignore[attr-defined]
    module.BatchPrefillWithPagedKVCacheWrapper = Paged  # type: ignore[attr-defined]
    module.merge_state_in_place = merge_state_in_place  # type: ignore[attr-defined]
    return module


class BlockDiagonalMask:
    """Queries of part i see the keys of part i."""

    def __init__(self, q_seqlen: list[int], kv_seqlen: list[int]) -> None:
        assert len(q_seqlen) == len(kv_seqlen)
        assert min([*q_seqlen, *kv_seqlen], default=1) > 0, "no part is empty: kernels differ in what they make of it"
        self.q_seqlen, self.kv_seqlen = q_seqlen, kv_seqlen

    @classmethod
    def from_seqlens(cls, q_seqlen: list[int], kv_seqlen: list[int], *, device: torch.device) -> "BlockDiagonalMask":
        assert device.type == "cpu"
        return cls(q_seqlen, kv_seqlen)


class BlockDiagonalCausalMask(BlockDiagonalMask):
    """Query i of a part sees the keys of the part up to number i."""

    def __init__(self, q_seqlen: list[int], kv_seqlen: list[int]) -> None:
        super().__init__(q_seqlen, kv_seqlen)
        assert q_seqlen == kv_seqlen


def memory_efficient_attention_partial(
    query: Tensor, key: Tensor, value: Tensor, attn_bias: BlockDiagonalMask, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend; [1, M, G, H, K] in and out, the log-sum-exp is [1, G, H, M]."""
    assert query.dim() == key.dim() == value.dim() == 5
    assert query.shape[2:] == key.shape[2:] == value.shape[2:]
    assert query.shape[1] == sum(attn_bias.q_seqlen)
    parts = zip(
        query[0].flatten(1, 2).split(attn_bias.q_seqlen),
        key[0].flatten(1, 2).split(attn_bias.kv_seqlen),
        value[0].flatten(1, 2).split(attn_bias.kv_seqlen),
        strict=True,
    )
    is_causal = isinstance(attn_bias, BlockDiagonalCausalMask)
    done = [attend(*part, scale, is_causal=is_causal) for part in parts]
    out = torch.cat([part for part, _ in done]).view(query.shape)
    return out, torch.cat([lse for _, lse in done]).T.view(1, *query.shape[2:4], -1)


def merge_attentions(attn_split: list[Tensor], lse_split: list[Tensor], write_lse: bool) -> tuple[Tensor, None]:
    assert not write_lse
    weights = torch.stack(lse_split).softmax(0).permute(0, 1, 4, 2, 3)[..., None]
    return (torch.stack(attn_split) * weights).sum(0).to(attn_split[0].dtype), None


def xformers_fmha() -> ModuleType:
    module = ModuleType("xformers.ops.fmha")
    masks = {mask.__name__: mask for mask in (BlockDiagonalMask, BlockDiagonalCausalMask)}
    module.attn_bias = SimpleNamespace(**masks)  # type: ignore[attr-defined]
    module.memory_efficient_attention_partial = memory_efficient_attention_partial  # type: ignore[attr-defined]
    module.merge_attentions = merge_attentions  # type: ignore[attr-defined]
    return module


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    max_seqlen_q: int,
    cu_seqlens_q: Tensor,
    max_seqlen_k: int,
    cu_seqlens_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    block_table: Tensor | None = None,
    return_softmax_lse: bool = False,
    out: Tensor | None = None,
    fa_version: int = 2,
) -> tuple[Tensor, Tensor]:
    """`vllm.vllm_flash_attn.flash_attn_varlen_func`: if causal, the last query of a sequence sees its last key."""
    assert return_softmax_lse
    assert fa_version in (2, 3)
    assert softmax_scale is not None
    assert q.dtype == k.dtype == v.dtype
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert (cu_seqlens_k is None) != (seqused_k is None)
    assert (block_table is None) == (seqused_k is None)
    assert cu_seqlens_q.dtype == torch.int32
    begins, ends = cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist()
    assert (begins[0], ends[-1]) == (0, len(q))
    keys = _paged(k, v, block_table, seqused_k) if block_table is not None else _packed(k, v, cu_seqlens_k)
    assert max_seqlen_q == max(end - begin for begin, end in zip(begins, ends, strict=True))
    assert max_seqlen_k == max(len(key) for key, _ in keys)
    assert min(len(key) for key, _ in keys) > 0, "no sequence is empty: versions differ in what they make of it"
    group, lse = q.shape[1] // k.shape[-2], torch.empty(q.shape[1], len(q))
    out = torch.empty(q.shape, dtype=q.dtype) if out is None else out
    assert out.shape == q.shape
    for begin, end, (key, value) in zip(begins, ends, keys, strict=True):
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        out[begin:end], of_rows = attend(q[begin:end], key, value, softmax_scale, is_causal=causal)
        lse[:, begin:end] = of_rows.T
    return out, lse


def _packed(k: Tensor, v: Tensor, offsets: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    assert offsets is not None
    assert offsets.dtype == torch.int32
    assert offsets[-1] == len(k) == len(v)
    lengths = offsets.diff().tolist()
    return list(zip(k.split(lengths), v.split(lengths), strict=True))


def _paged(k: Tensor, v: Tensor, table: Tensor, used: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    """Read [num_pages, page_size, num_kv_heads, head_dim]; entries behind a sequence's pages are not read."""
    assert used is not None
    assert table.dtype == used.dtype == torch.int32
    assert table.stride(-1) == 1
    assert k.shape[1] % 16 == 0
    assert 0 <= int(table.min()) <= int(table.max()) < len(k)
    return [
        (k[pages.long()].flatten(0, 1)[:length], v[pages.long()].flatten(0, 1)[:length])
        for pages, length in zip(table, used.tolist(), strict=True)
    ]


def merge_attn_states(
    output: Tensor, prefix_output: Tensor, prefix_lse: Tensor, suffix_output: Tensor, suffix_lse: Tensor
) -> None:
    """`vllm.v1.attention.ops.merge_attn_states.merge_attn_states`; sums are [num_heads, num_rows]."""
    assert output.shape == prefix_output.shape == suffix_output.shape
    assert prefix_output.stride(1) == suffix_output.stride(1)
    assert all(part.is_contiguous() for part in (prefix_output, suffix_output, prefix_lse, suffix_lse))
    total = torch.logaddexp(prefix_lse, suffix_lse)
    prefix, suffix = ((lse - total).exp().T[..., None] for lse in (prefix_lse, suffix_lse))
    output.copy_(prefix_output * prefix + suffix_output * suffix)


def vllm_modules() -> dict[str, ModuleType]:
    """The modules of vLLM that `vllm` imports."""
    contents: dict[str, dict[str, Any]] = {
        "vllm.vllm_flash_attn": {
            "flash_attn_varlen_func": flash_attn_varlen_func,
            "fa_version_unsupported_reason": lambda version: None,
        },
        "vllm.v1.attention.backends.fa_utils": {"get_flash_attn_version": lambda head_size: 3},
        "vllm.v1.attention.ops.merge_attn_states": {"merge_attn_states": merge_attn_states},
    }
    modules = {name: ModuleType(name) for name in contents}
    for name, module in modules.items():
        vars(module).update(contents[name])
    return modules
