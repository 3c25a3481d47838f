"""The native ops, one typed function each. The library is loaded at the first call, or by `load.require`."""

from vllm_dllm.ops.counter_uniform import counter_uniform
from vllm_dllm.ops.draft_graph_attention import draft_graph_attention
from vllm_dllm.ops.load import require

__all__ = ["counter_uniform", "draft_graph_attention", "require"]
