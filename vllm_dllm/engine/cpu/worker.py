"""The worker of a CPU."""

from contextlib import nullcontext
from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_dllm.engine.cpu import activate
from vllm_dllm.engine.cpu.block_tables import CpuBlockTables
from vllm_dllm.engine.cpu.experts import use_own_experts
from vllm_dllm.engine.cpu.gate import is_needed
from vllm_dllm.engine.cpu.lora import use_own_rows
from vllm_dllm.engine.patches import become, replaced_while
from vllm_dllm.engine.worker import ReportingWorker


class DllmCpuWorker(ReportingWorker, CPUWorker):
    """vLLM's, with a way for reports, and without Triton where there is none."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with replaced_while("gpu_worker.HAS_TRITON", True) if is_needed() else nullcontext():
            super().__init__(*args, **kwargs)

    def init_device(self) -> None:
        """Make the runner, whose kernels need code without Triton."""
        activate()
        super().init_device()

    def load_model(self, **kwargs: Any) -> None:
        """Load the model; vLLM makes what applies adapters with it."""
        super().load_model(**kwargs)
        use_own_experts(self.model_runner.model)
        if self.vllm_config.lora_config:
            use_own_rows(self.model_runner.lora_manager)

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """Allocate the K/V cache; the page tables come with it."""
        super().initialize_from_config(kv_cache_config)
        if is_needed():
            become(self.model_runner.block_tables, CpuBlockTables)
