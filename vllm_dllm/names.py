"""The names that settings choose by. A module of its own, so that decoding needs no library that checks settings."""

from typing import Literal

# fmt: off
PolicyName = Literal[
    "static", "random", "threshold", "factor", "margin", "entropy", "origin", "sequential", "dynamic",
    "entropy_bounded", "credit",
]
# fmt: on
"""Unmasking policies, see `unmask.policy`."""

KvPolicyName = Literal["dual", "prefix", "freecache", "vicinity", "dkv", "dkv_pd", "block_causal", "causal", "window"]
"""Which K/V a step recomputes, see `state.kv`."""

BIDIRECTIONAL: tuple[KvPolicyName, ...] = ("dual", "prefix", "freecache", "vicinity", "dkv", "dkv_pd")
"""Those of models whose positions see all others."""

DELAYED: tuple[KvPolicyName, ...] = ("dkv", "dkv_pd")
"""Those of them that keep a token's K/V from the step on that follows the one which unmasked it."""

AttentionName = Literal["auto", "csrc", "vllm", "flashinfer", "xformers", "torch"]
"""Implementations of attention, see `attention.choose`."""

ServedMode = Literal["diffusion", "self_speculation"]
"""How requests are decoded; mode `ar` is vLLM's own."""
