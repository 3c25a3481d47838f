"""The native ops, one typed function each. The library is loaded at the first call, or by `load.require`."""

from vllm_dllm.ops.load import require
from vllm_dllm.ops.vocab_stats import vocab_stats

__all__ = ["require", "vocab_stats"]
