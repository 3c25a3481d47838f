"""What our workers do beside vLLM's: they open the way of reports when the engine starts.

`engine.gpu_worker` and `engine.cpu.worker` put this before the worker that vLLM has for the device; the configuration's
`worker_cls` names them.
"""

from typing import TYPE_CHECKING, Any

from vllm_dllm.engine.costs import measure_curve
from vllm_dllm.engine.report import ReportConnector, check_way
from vllm_dllm.engine.step_timer import StepTimer
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
        timer = StepTimer(runner)
        costs = measure_curve(self.vllm_config, timer.measure, timer.captured_rows())
        runner.sampler.check = WorkerCheck(runner)
        runner.aux_output_connector = ReportConnector(runner.sampler, costs)
        return times
