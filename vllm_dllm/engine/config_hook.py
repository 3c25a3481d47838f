"""Configuration of an engine that serves one of our models: what is set, and what is refused at start."""

from collections.abc import Callable
from typing import Any

from vllm.config import ModelConfig, VllmConfig
from vllm.config.compilation import CompilationMode, CUDAGraphMode
from vllm.config.diffusion import DiffusionConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from vllm_dllm.config import DllmConfig, parse_server_settings
from vllm_dllm.errors import ConfigError
from vllm_dllm.models.interface import family_of

logger = init_logger("vllm.dllm")

SCHEDULER = "vllm_dllm.engine.scheduler.DllmScheduler"

KV_CACHE_DTYPES = ("auto", "float16", "bfloat16")

# What cannot work, as (is it asked for, sentence). The sentence says what was given, what is allowed and what to do; it
# is formatted with the configuration as `c`.
_Refusal = tuple[Callable[[VllmConfig], Any], str]
_REFUSALS: tuple[_Refusal, ...] = (
    (lambda c: c.lora_config, "LoRA is on, but diffusion models do not support it; remove --enable-lora"),
    (
        lambda c: c.parallel_config.pipeline_parallel_size > 1,
        "pipeline_parallel_size is {c.parallel_config.pipeline_parallel_size}, but diffusion models run in one stage; "
        "allowed is 1; use --tensor-parallel-size",
    ),
    (
        lambda c: (
            c.parallel_config.decode_context_parallel_size > 1 or c.parallel_config.prefill_context_parallel_size > 1
        ),
        "context parallelism is on, but diffusion models do not support it; allowed is size 1; remove its flags",
    ),
    (
        lambda c: c.parallel_config.enable_batch_sharded_sampling,
        "enable_batch_sharded_sampling is on, but the sampler of diffusion models keeps whole canvases on each rank; "
        "remove the flag",
    ),
    (
        lambda c: c.parallel_config.use_ubatching,
        "dual batch overlap is on, but diffusion models do not support it; remove --enable-dbo",
    ),
    (
        lambda c: c.speculative_config,
        "speculative_config is set to method {c.speculative_config.method!r}, which drafts left to right; a diffusion "
        "model unmasks in any order; remove --speculative-config",
    ),
    (
        lambda c: c.diffusion_config,
        "diffusion_config is set, but it belongs to another model; give additional_config.dllm.block_length instead",
    ),
    (
        lambda c: c.scheduler_config.async_scheduling,
        "async_scheduling is on, but the host must know which requests begin a block; remove --async-scheduling",
    ),
    (
        lambda c: c.scheduler_config.scheduler_cls,
        "scheduler_cls is set, but diffusion models need their own scheduler; remove --scheduler-cls",
    ),
    (
        lambda c: c.scheduler_config.long_prefill_token_threshold,
        "long_prefill_token_threshold is {c.scheduler_config.long_prefill_token_threshold}, but it would cut blocks "
        "apart; allowed is 0; remove it",
    ),
    (
        lambda c: c.scheduler_config.max_num_scheduled_tokens,
        "max_num_scheduled_tokens is {c.scheduler_config.max_num_scheduled_tokens}, but it could cut blocks apart; "
        "remove it",
    ),
    (
        lambda c: c.model_config.runner_type != "generate",
        "runner is {c.model_config.runner_type!r}, but diffusion models generate; allowed is 'generate'; remove "
        "--runner",
    ),
    (
        lambda c: c.attention_config.backend,
        "attention_backend is {c.attention_config.backend.name}, but diffusion models bring their own; remove "
        "--attention-backend",
    ),
    (
        lambda c: c.cache_config.kv_offloading_size,
        "kv_offloading_size is {c.cache_config.kv_offloading_size}, but the K/V of a bidirectional model change until "
        "the request ends; remove it",
    ),
    (
        lambda c: c.kv_transfer_config,
        "kv_transfer_config is set, but the K/V of a bidirectional model change until the request ends; remove it",
    ),
    (
        lambda c: c.cache_config.cache_dtype not in KV_CACHE_DTYPES,
        "kv_cache_dtype is {c.cache_config.cache_dtype!r}, but attention of diffusion models reads "
        + ", ".join(KV_CACHE_DTYPES)
        + "; remove --kv-cache-dtype",
    ),
    (
        lambda c: c.cache_config.kv_sharing_fast_prefill,
        "kv_sharing_fast_prefill is on, but diffusion models do not support it; remove the flag",
    ),
    (
        lambda c: c.model_config.enable_prompt_embeds,
        "prompt embeddings are on, but diffusion models take token ids; remove --enable-prompt-embeds",
    ),
    (
        lambda c: c.model_config.logits_processors,
        "logits_processors are set, but diffusion models do not apply them; remove --logits-processors",
    ),
    (
        lambda c: c.model_config.return_sampling_mask or c.model_config.enable_trace_replay,
        "sampling replay is on, but diffusion models do not support it; remove the flag",
    ),
    (
        lambda c: c.watermark_config,
        "watermark_config is set, but the sampler of diffusion models does not apply it; remove it",
    ),
)


def is_ours(model_config: ModelConfig) -> bool:
    """Tell whether a model is served by this plugin."""
    return family_of(model_config.architectures) is not None


def settings_of(vllm_config: VllmConfig) -> DllmConfig:
    """Read the server's settings from `additional_config["dllm"]`."""
    additional = vllm_config.additional_config
    return parse_server_settings(additional.get("dllm", {}) if isinstance(additional, dict) else {})


def refuse_explicit_flags(args: EngineArgs, model_config: ModelConfig) -> None:
    """Refuse flags that vLLM turns on by itself for other models, where the user asked for them.

    Raises: ConfigError.
    """
    if not is_ours(model_config):
        return
    if args.enable_prefix_caching:
        raise ConfigError(
            "enable_prefix_caching is on, but the K/V of a bidirectional model depend on what follows the prefix; "
            "allowed is off; remove --enable-prefix-caching"
        )
    if args.enable_chunked_prefill:
        raise ConfigError(
            "enable_chunked_prefill is on, but a bidirectional model sees its whole prompt at once; allowed is off; "
            "remove --enable-chunked-prefill"
        )


def clear_flags(args: EngineArgs, model_config: ModelConfig) -> None:
    """Turn off for our models what vLLM turned on by default."""
    if is_ours(model_config):
        args.enable_prefix_caching = False
        args.enable_chunked_prefill = False


class DllmConfigHook(VerifyAndUpdateConfig):
    """What vLLM calls while it builds the configuration of one of our models."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Mark the model as a diffusion model and set its published decoding defaults."""
        family = family_of(model_config.architectures)
        assert family is not None, "the hook is registered for our architectures only"
        model_config.hf_config.canvas_length = DllmConfig().block_length
        if model_config.generation_config == "auto":
            given = {**model_config.try_get_generation_config(), **model_config.override_generation_config}
            for name, value in family.generation_defaults.items():
                if name not in given:
                    model_config.override_generation_config[name] = value

    @classmethod
    def verify_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Refuse what cannot work and set what diffusion needs.

        Raises: ConfigError with one sentence.
        """
        for is_asked_for, sentence in _REFUSALS:
            if is_asked_for(vllm_config):
                raise ConfigError(sentence.format(c=vllm_config))
        settings = settings_of(vllm_config)
        if settings.block_length > vllm_config.model_config.max_model_len:
            raise ConfigError(
                f"additional_config.dllm.block_length is {settings.block_length}, but max_model_len is "
                f"{vllm_config.model_config.max_model_len}; choose a smaller block_length"
            )
        vllm_config.model_config.hf_config.canvas_length = settings.block_length
        vllm_config.diffusion_config = DiffusionConfig(canvas_length=settings.block_length)
        _set_scheduler(vllm_config, settings)
        _set_cuda_graphs(vllm_config, settings)
        # vLLM's kernel warm-up steps requests with sampling parameters that are refused here (penalties, logprobs),
        # past the end of their generation; without it the runner's few Triton kernels compile in the first request.
        vllm_config.kernel_config.enable_jit_warmup = False
        logger.info(
            "Serving %s by block diffusion: %s", vllm_config.model_config.architectures[0], settings.model_dump_json()
        )


def _set_scheduler(vllm_config: VllmConfig, settings: DllmConfig) -> None:
    """Make the token budget large enough for every running request's block and the longest prompt in one step.

    A prompt's rows count against the budget, although they are not computed.
    """
    scheduler = vllm_config.scheduler_config
    scheduler.scheduler_cls = SCHEDULER
    scheduler.async_scheduling = False
    needed = scheduler.max_num_seqs * settings.block_length + vllm_config.model_config.max_model_len
    if scheduler.max_num_batched_tokens < needed:
        logger.info(
            "Raising max_num_batched_tokens from %d to %d: max_num_seqs=%d blocks of %d and max_model_len",
            scheduler.max_num_batched_tokens,
            needed,
            scheduler.max_num_seqs,
            settings.block_length,
        )
        scheduler.max_num_batched_tokens = needed


def _set_cuda_graphs(vllm_config: VllmConfig, settings: DllmConfig) -> None:
    """Capture denoising steps whole: their shape is the number of requests times the block length.

    Refreshes differ in shape and run eagerly; nothing is compiled.
    """
    compilation = vllm_config.compilation_config
    compilation.mode = CompilationMode.NONE
    if vllm_config.model_config.enforce_eager or compilation.cudagraph_mode == CUDAGraphMode.NONE:
        return
    compilation.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
    if compilation.cudagraph_capture_sizes is None:
        most = vllm_config.scheduler_config.max_num_seqs
        num_reqs = sorted({n for n in (1, 2, 4, *range(8, most, 8), most) if n <= most})
        compilation.cudagraph_capture_sizes = [n * settings.block_length for n in num_reqs]
        compilation.max_cudagraph_capture_size = most * settings.block_length
    elif any(size % settings.block_length for size in compilation.cudagraph_capture_sizes):
        raise ConfigError(
            f"cudagraph_capture_sizes are {compilation.cudagraph_capture_sizes}, but a step has block_length "
            f"{settings.block_length} rows for each request; give multiples of it"
        )
