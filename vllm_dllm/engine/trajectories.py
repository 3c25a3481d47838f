"""Records the trajectories of an engine that runs in this process; docs/trajectories.md."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm_dllm.blocks import row_blocks
from vllm_dllm.engine.configs import is_ours, settings_of
from vllm_dllm.errors import ConfigError
from vllm_dllm.trajectory import GIVEN, StepRecorder, Trajectory

if TYPE_CHECKING:
    from vllm import LLM, CompletionOutput, RequestOutput


class TrajectoryRecorder:
    """Sees every step that an `LLM` decides from now on; each step then waits for the device.

    Args:
        llm: of one process, VLLM_ENABLE_V1_MULTIPROCESSING=0, with one worker in it.

    Raises: ConfigError for an engine of other processes, and for a model whose tokens no steps of blocks write.
    """

    def __init__(self, llm: "LLM") -> None:
        engine = llm.llm_engine
        executor = getattr(engine, "model_executor", None)
        driver = getattr(executor, "driver_worker", None)
        if driver is None or engine.vllm_config.parallel_config.world_size > 1:
            raise ConfigError(
                "the engine runs in other processes, where its steps cannot be recorded; set "
                "VLLM_ENABLE_V1_MULTIPROCESSING=0 and give LLM distributed_executor_backend='uni'"
            )
        if not is_ours(engine.model_config):
            raise ConfigError("the model is no diffusion model; trajectories are recorded of diffusion models")
        if engine.vllm_config.scheduler_config.async_scheduling:
            raise ConfigError(
                "the engine schedules a step ahead, where some steps turn out to be void after they were seen; give "
                "LLM async_scheduling=False"
            )
        self._settings = settings_of(engine.vllm_config)
        if self._settings.has_windows or self._settings.mode != "diffusion":
            raise ConfigError(
                "the model is served by windows (WeDLM) or in another mode than 'diffusion', where no steps of blocks "
                "write tokens; trajectories are recorded of the other families in mode 'diffusion'"
            )
        self._max_model_len = engine.model_config.max_model_len
        runner = driver.worker.model_runner
        self._steps = StepRecorder(runner.req_states.index_to_req_id.__getitem__)
        self._denoiser = runner.model_state.denoiser
        self._denoiser.observer = self._steps.observe

    def take(self, outputs: "Sequence[RequestOutput]") -> list[Trajectory]:
        """Return the trajectories of finished outputs, and forget their steps.

        Args:
            outputs: of requests that began after this was made, with `SamplingParams(logprobs=0)` or more.

        Raises: ConfigError for an output without log-probabilities, and for one whose steps were not seen.
        """
        return [self._trajectory(output, each) for output in outputs for each in output.outputs]

    def close(self) -> None:
        """See no more steps."""
        self._denoiser.observer = None

    def _trajectory(self, output: "RequestOutput", its: "CompletionOutput") -> Trajectory:
        request, prompt, tokens = output.request_id, list(output.prompt_token_ids or ()), list(its.token_ids)
        if its.logprobs is None:
            raise ConfigError(
                f"request {request} has no log-probabilities, which its trajectory is made of; give "
                "SamplingParams(logprobs=0)"
            )
        # vLLM names replies of one request by their index, and appends a random suffix to all names.
        name = request if len(output.outputs) == 1 else f"{its.index}_{request}"
        try:
            steps = self._steps.take(lambda own: name in (own, own.rpartition("-")[0]))
        except KeyError:
            raise ConfigError(
                f"no step of request {request} was recorded; make the TrajectoryRecorder before generating, and take "
                "each output once"
            ) from None
        places = range(len(prompt), len(prompt) + len(tokens))
        blocks = row_blocks(len(prompt), max(1, len(tokens)), self._settings, self._max_model_len)
        length = blocks.block_length
        return Trajectory(
            request=request,
            index=its.index,
            prompt_token_ids=prompt,
            token_ids=tokens,
            block_start=[place - (place - blocks.begin) % length for place in places],
            step=[steps.get(place, GIVEN) for place in places],
            logprob=[its.logprobs[i][token].logprob for i, token in enumerate(tokens)],
        )
