"""What our workers do beside vLLM's: they open the way of reports when the engine starts.

`engine.gpu_worker` and `engine.cpu.worker` put this before the worker that vLLM has for the device; the configuration's
`worker_cls` names them.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_dllm.engine.costs import measure_curve
from vllm_dllm.engine.report import ReportConnector, check_way
from vllm_dllm.engine.worker_check import WorkerCheck

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_worker import Worker as VllmWorker
else:
    VllmWorker = object


class ReportingWorker(VllmWorker):
    """To be put before a worker of vLLM's."""

    def compile_or_warm_up_model(self) -> Any:
        """Do the last thing that an engine asks of a worker before the first request.

        Raises: UnsupportedVllmError where reports would not arrive as they are.
        """
        times = super().compile_or_warm_up_model()
        runner = self.model_runner
        check_way(runner.main_stream, runner.output_copy_stream, runner.device)
        costs = measure_curve(self.vllm_config, self.measure_cost)
        runner.sampler.check = WorkerCheck(runner)
        runner.aux_output_connector = ReportConnector(runner.sampler, costs)
        return times

    def measure_cost(self, num_reqs: int, num_nodes: int) -> float:
        """Time a step of so many requests with so many canvases each, in ms, with as many adapters as one may have."""
        state, lora = self.model_runner.model_state, self.vllm_config.lora_config
        if lora is None:
            return float(state.measure_cost(num_reqs, num_nodes))
        num_rows, num_sampled = (np.full(num_reqs, n, dtype=np.int32) for n in (num_nodes * state.block_length, 1))
        with self.model_runner.maybe_dummy_run_with_lora(lora, num_rows, num_sampled, num_active_loras=lora.max_loras):
            return float(state.measure_cost(num_reqs, num_nodes))
