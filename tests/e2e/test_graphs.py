"""What a captured CUDA graph would replay, replayed eagerly: captured metadata and buffers, later steps' values.

vLLM's own `prepare_inputs_to_capture` makes the metadata once; each step then runs the model on the persistent buffers
with that metadata, padded to the captured size, as a graph does.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.rig import Oracle, engine, mixed_cases, run

pytestmark = pytest.mark.engine

SETTINGS = {"block_length": 8}
CAPTURED_NUM_REQS = (1, 2, 4, 8, 16)


class EagerGraphs:
    """Stands for vLLM's graph manager on a device without graphs."""

    def __init__(self, runner: Any) -> None:
        from vllm.config.compilation import CUDAGraphMode
        from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, prepare_inputs_to_capture

        self.runner = runner
        self.num_replays = 0
        self.graphs = {}
        for num_reqs in CAPTURED_NUM_REQS:
            desc = BatchExecutionDescriptor(
                cg_mode=CUDAGraphMode.FULL, num_tokens=num_reqs * 8, num_reqs=num_reqs, uniform_token_count=8
            )
            state = prepare_inputs_to_capture(
                num_reqs,
                num_reqs * 8,
                runner.model_state,
                runner.input_buffers,
                runner.block_tables,
                runner.attn_groups,
                runner.kv_cache_config,
                full_cudagraph=True,
                max_query_len=8,
            )
            self.graphs[num_reqs] = (desc, state)
        self.eager = runner.cudagraph_manager

    def __getattr__(self, name: str) -> Any:
        return getattr(self.eager, name)

    def dispatch(self, num_reqs: int, num_tokens: int, uniform_token_count: int | None, *args: Any, **kw: Any) -> Any:
        if uniform_token_count != 8:
            return self.eager.dispatch(num_reqs, num_tokens, uniform_token_count, *args, **kw)
        return self.graphs[min(n for n in CAPTURED_NUM_REQS if n >= num_reqs)][0]

    def run_fullgraph(self, desc: Any) -> torch.Tensor:
        from vllm.forward_context import set_forward_context

        self.num_replays += 1
        metadata, slot_mappings = self.graphs[desc.num_reqs][1]
        buffers = self.runner.input_buffers
        ids, positions = buffers.input_ids[: desc.num_tokens], buffers.positions[: desc.num_tokens]
        config = self.runner.vllm_config
        with set_forward_context(metadata, config, num_tokens=desc.num_tokens, slot_mapping=slot_mappings):
            return self.runner.model(input_ids=ids, positions=positions)


def test_replayed_steps_equal_reference(oracle: Oracle, wild: Path) -> None:
    cases = mixed_cases(8, seed=11)
    with engine(wild, SETTINGS) as llm:
        runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
        graphs = runner.cudagraph_manager = EagerGraphs(runner)
        assert run(llm, cases) == [oracle.tokens(case, SETTINGS) for case in cases]
        assert graphs.num_replays > 16
