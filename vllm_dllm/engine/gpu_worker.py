"""The worker of a GPU."""

from vllm.v1.worker.gpu_worker import Worker

from vllm_dllm.engine.worker import ReportingWorker


class DllmWorker(ReportingWorker, Worker):
    """vLLM's, with a way for reports."""
