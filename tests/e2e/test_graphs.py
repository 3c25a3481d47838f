"""What a captured CUDA graph would replay, replayed eagerly: captured metadata and buffers, later steps' values.

vLLM's own `prepare_inputs_to_capture` makes the metadata once; each step then runs the model on the persistent buffers
with that metadata, padded to the captured size, as a graph does.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.rig import NUM_SLOTS, Oracle, engine, mixed_cases, random_graph, run, speculation
from vllm_dllm.engine.costs import step_shapes
from vllm_dllm.engine.step_timer import StepTimer

pytestmark = [pytest.mark.engine, pytest.mark.slow("engines")]

BLOCK_LENGTH = 8
SETTINGS = {"block_length": BLOCK_LENGTH}


class EagerGraphs:
    """Stands for vLLM's graph manager on a device without graphs.

    Args:
        llm: the engine.
        num_blocks: sizes to capture, in blocks.
        is_mixed: whether a graph takes any batch of its number of rows, as with `CUDAGraphMode.FULL`, or only steps
            with one block per request.
    """

    def __init__(self, llm: Any, num_blocks: list[int], *, is_mixed: bool) -> None:
        from vllm.config.compilation import CUDAGraphMode
        from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, prepare_inputs_to_capture

        runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
        # As where there are graphs: a step of any other shape counts as larger than the largest.
        llm.llm_engine.engine_core.engine_core.scheduler._largest_graph = max(num_blocks) * BLOCK_LENGTH
        self.runner = runner
        self.is_mixed = is_mixed
        runner.model_state.attention.prepare_capture(runner.vllm_config)  # as where there are graphs
        self.num_replays = 0
        self.graphs = {}
        for size in (n * BLOCK_LENGTH for n in num_blocks):
            num_reqs = min(size, NUM_SLOTS) if is_mixed else size // BLOCK_LENGTH
            uniform = None if is_mixed else BLOCK_LENGTH
            desc = BatchExecutionDescriptor(
                cg_mode=CUDAGraphMode.FULL, num_tokens=size, num_reqs=num_reqs, uniform_token_count=uniform
            )
            state = prepare_inputs_to_capture(
                num_reqs,
                size,
                runner.model_state,
                runner.input_buffers,
                runner.block_tables,
                runner.attn_groups,
                runner.kv_cache_config,
                full_cudagraph=True,
                max_query_len=uniform,
            )
            self.graphs[size] = (desc, state)
        self.eager = runner.cudagraph_manager
        runner.cudagraph_manager = self

    def __getattr__(self, name: str) -> Any:
        return getattr(self.eager, name)

    def dispatch(self, num_reqs: int, num_tokens: int, uniform_token_count: int | None, *args: Any, **kw: Any) -> Any:
        fitting = [size for size in self.graphs if size >= num_tokens]
        if not fitting or not (self.is_mixed or uniform_token_count == BLOCK_LENGTH):
            return self.eager.dispatch(num_reqs, num_tokens, uniform_token_count, *args, **kw)
        return self.graphs[min(fitting)][0]

    def run_fullgraph(self, desc: Any) -> torch.Tensor:
        from vllm.forward_context import set_forward_context

        self.num_replays += 1
        metadata, slot_mappings = self.graphs[desc.num_tokens][1]
        buffers = self.runner.input_buffers
        ids, positions = buffers.input_ids[: desc.num_tokens], buffers.positions[: desc.num_tokens]
        config = self.runner.vllm_config
        with set_forward_context(metadata, config, num_tokens=desc.num_tokens, slot_mapping=slot_mappings):
            return self.runner.model(input_ids=ids, positions=positions)


SLOW = pytest.param("prefix", 1, marks=pytest.mark.slow("configurations"))


@pytest.mark.parametrize(("kv_policy", "num_replays"), [("dual", 17), SLOW])
def test_replayed_steps_equal_reference(oracle: Oracle, wild: Path, kv_policy: str, num_replays: int) -> None:
    cases, settings = mixed_cases(BLOCK_LENGTH, seed=11), {**SETTINGS, "kv_policy": kv_policy}
    with engine(wild, settings) as llm:
        graphs = EagerGraphs(llm, [1, 2, 4, 8, 16], is_mixed=False)
        assert run(llm, cases) == [oracle.tokens(case, settings) for case in cases]
        assert graphs.num_replays >= num_replays, "under prefix only last blocks have the shape of a graph"


@pytest.mark.always
def test_replayed_steps_with_drafts_equal_reference(mild_oracle: Oracle, mild: Path) -> None:
    cases = mixed_cases(BLOCK_LENGTH, seed=11)
    config = speculation(random_graph(2, 6, BLOCK_LENGTH), 4)
    with engine(mild, SETTINGS, speculative_config=config, max_model_len=256) as llm:
        graphs = EagerGraphs(llm, [1, 3, 7, 12, 24, 48, 80], is_mixed=True)
        assert run(llm, cases) == [mild_oracle.tokens(case, SETTINGS) for case in cases]
        assert graphs.num_replays > 16
        graphs.num_replays = 0
        times = measure_steps(llm, list(graphs.graphs))
        assert graphs.num_replays == 2 * len(graphs.graphs)
        assert min(times) > 0
        assert run(llm, cases[:2]) == [mild_oracle.tokens(case, SETTINGS) for case in cases[:2]], "nothing is left"


def measure_steps(llm: Any, sizes: list[int]) -> list[float]:
    """Time captured steps as a worker does when it starts; check what each replays."""
    worker = llm.llm_engine.model_executor.driver_worker.worker
    worker.vllm_config.compilation_config.cudagraph_capture_sizes = sizes
    timer = StepTimer(worker.model_runner)
    assert timer.captured_rows() == sizes
    times = []
    for shape in step_shapes(sizes, BLOCK_LENGTH, NUM_SLOTS, 4):
        if shape.is_captured:
            times.append(timer.measure(shape))
            captured = worker.model_runner.model_state.attention.captured
            num_nodes = shape.num_reqs * shape.num_canvases
            seen = captured._packed[: 4 * shape.rows // BLOCK_LENGTH].view(-1, 4)[:, 1]  # ends of what is stored
            assert (seen > 0).sum() == num_nodes <= shape.rows // BLOCK_LENGTH, "padding sees itself alone"
    return times
