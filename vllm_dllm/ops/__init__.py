"""The native ops, one typed function each. The library is loaded at the first call, or by `load.require`."""

from vllm_dllm.ops.decide_walk import decide_walk
from vllm_dllm.ops.draft_graph_attention import draft_graph_attention
from vllm_dllm.ops.load import require
from vllm_dllm.ops.propose_nodes import propose_nodes
from vllm_dllm.ops.row_draws import row_draws
from vllm_dllm.ops.settle_step import settle_step
from vllm_dllm.ops.step_rows import step_rows
from vllm_dllm.ops.vocab_stats import vocab_stats

__all__ = [
    "decide_walk",
    "draft_graph_attention",
    "propose_nodes",
    "require",
    "row_draws",
    "settle_step",
    "step_rows",
    "vocab_stats",
]
