"""The names that settings choose by. A module of its own, so that decoding needs no library that checks settings."""

from typing import Literal

# fmt: off
PolicyName = Literal[
    "static", "random", "threshold", "factor", "margin", "entropy", "origin", "sequential", "dynamic",
    "entropy_bounded", "credit",
]
# fmt: on
"""Unmasking policies, see `unmask.policy`."""

KvPolicyName = Literal["dual", "prefix", "freecache", "vicinity", "dkv", "block_causal", "causal", "window"]
"""Which K/V a step recomputes, see `state.kv`."""

BIDIRECTIONAL: tuple[KvPolicyName, ...] = ("dual", "prefix", "freecache", "vicinity", "dkv")
"""Those of models whose positions see all others."""

AttentionName = Literal["auto", "csrc", "vllm", "flashinfer", "xformers", "torch"]
"""Implementations of attention, see `attention.choose`."""

ServedMode = Literal["diffusion", "self_speculation"]
"""How requests are decoded; mode `ar` is vLLM's own."""
