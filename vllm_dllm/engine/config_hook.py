"""Configuration of an engine that serves one of our models: what is set, and what is refused at start."""

from collections.abc import Callable, Mapping
from pkgutil import resolve_name
from typing import Any

from transformers import PretrainedConfig
from vllm import envs
from vllm.config import ModelConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform

from vllm_dllm.additional_config import settings_in
from vllm_dllm.blocks import max_prompt_len
from vllm_dllm.config import DllmConfig
from vllm_dllm.engine import natives
from vllm_dllm.engine.attention_choice import set_attention
from vllm_dllm.engine.configs import (
    DllmModelConfig,
    become_dllm,
    compile_nothing,
    is_ours,
    served_family,
)
from vllm_dllm.engine.contracts import LORA_CONTRACTS, check_contracts
from vllm_dllm.engine.generation_defaults import check_generation_defaults, family_defaults
from vllm_dllm.engine.natives import WORKERS
from vllm_dllm.engine.patches import become
from vllm_dllm.engine.step_sizes import set_page_size, set_step_sizes
from vllm_dllm.engine.worker_check import check_level
from vllm_dllm.errors import ConfigError
from vllm_dllm.models.checkpoint_fields import SPECIAL_IDS, check_token_ids
from vllm_dllm.models.interface import check_family, family_said
from vllm_dllm.plugin import SUPPORTED_VLLM
from vllm_dllm.spiffy_config import SpiffySettings

logger = init_logger("vllm.dllm")

KV_CACHE_DTYPES = ("auto", "float16", "bfloat16")
_KV_CACHE_DTYPE = (
    f"kv_cache_dtype is '{{}}', but attention of diffusion models reads {', '.join(KV_CACHE_DTYPES)}; remove "
    "--kv-cache-dtype"
)

LORA_MODULES = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj")
"""The modules that an adapter may change, not the embedding and the LM head, by the names of `models.transformer`."""

# What cannot work, as (is it asked for, sentence). The sentence says what was given, what is allowed and what to do; it
# is formatted with the configuration as `c`.
_Refusal = tuple[Callable[[VllmConfig], Any], str]
_REFUSALS: tuple[_Refusal, ...] = (
    (
        lambda c: c.lora_config and not {*(c.lora_config.target_modules or ())} <= {*LORA_MODULES},
        "lora_target_modules is {c.lora_config.target_modules}, but adapters of diffusion models change the linear "
        "modules of the layers, by the names that they have in vLLM; allowed are "
        + ", ".join(LORA_MODULES)
        + "; correct --lora-target-modules or remove it",
    ),
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
        lambda c: envs.VLLM_RAISE_ON_LOGIT_NANS,
        "VLLM_RAISE_ON_LOGIT_NANS is set, but diffusion models do not count NaNs; allowed is 0; unset it",
    ),
    (
        lambda c: c.scheduler_config.scheduler_cls,
        "scheduler_cls is set, but diffusion models need their own scheduler; remove --scheduler-cls",
    ),
    (
        lambda c: c.parallel_config.worker_cls not in ("auto", *WORKERS),
        "worker_cls is {c.parallel_config.worker_cls!r}, but diffusion models need their own worker; remove "
        "--worker-cls",
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
        lambda c: c.model_config.logprobs_mode != "raw_logprobs",
        "logprobs_mode is {c.model_config.logprobs_mode!r}, but diffusion models give log-probabilities before "
        "temperature and filters (docs/sampling.md); allowed is 'raw_logprobs'; remove --logprobs-mode",
    ),
    (
        lambda c: c.attention_config.backend,
        "attention_backend is {c.attention_config.backend.name}, but diffusion models bring their own; remove "
        "--attention-backend",
    ),
    (
        lambda c: c.cache_config.kv_offloading_size,
        "kv_offloading_size is {c.cache_config.kv_offloading_size}, but diffusion models store K/V when blocks end, "
        "not when vLLM counts them; remove it",
    ),
    (
        lambda c: c.kv_transfer_config,
        "kv_transfer_config is set, but diffusion models store K/V when blocks end, not when vLLM counts them; remove "
        "it",
    ),
    (
        lambda c: c.cache_config.cache_dtype not in KV_CACHE_DTYPES,
        _KV_CACHE_DTYPE.format("{c.cache_config.cache_dtype}"),
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
        lambda c: _quantises_to_fp8(c.model_config) and current_platform.is_cpu(),
        "quantization is {c.model_config.quantization!r}, but vLLM has no kernel that makes fp8 of weights on a CPU; "
        "allowed there are checkpoints that are quantised; remove --quantization",
    ),
    (
        lambda c: _has_experts(c) and c.lora_config,
        "enable_lora is on, but adapters of models with experts are not tested with diffusion; allowed is off; remove "
        "--enable-lora, or merge the adapter into the weights",
    ),
    (
        lambda c: _has_experts(c) and c.parallel_config.data_parallel_size > 1,
        "data_parallel_size is {c.parallel_config.data_parallel_size}, but engines that share their experts exchange "
        "as many rows as vLLM scheduled, which a step of a diffusion model has not, and on a CPU vLLM has no exchange; "
        "allowed is 1; start servers of their own",
    ),
    (
        lambda c: c.watermark_config,
        "watermark_config is set, but the sampler of diffusion models does not apply it; remove it",
    ),
)


def _is_block_causal(model_config: ModelConfig) -> bool:
    return served_family(model_config).is_block_causal


def _has_experts(config: VllmConfig) -> bool:
    return bool(config.model_config.hf_config.has_experts)


def _quantises_to_fp8(model_config: ModelConfig) -> bool:
    is_quantised = getattr(model_config.hf_config, "quantization_config", None) is not None
    return not is_quantised and str(model_config.quantization).startswith("fp8")


def read_config(content: Mapping[str, Any], overrides: object) -> PretrainedConfig | None:
    """Make the configuration of a config.json of ours, under its family's architecture.

    None of another's; and of one with another `model_type` or an `auto_map` that is none, which start errors tell.

    Args:
        content: the file's.
        overrides: --hf-overrides, which vLLM sets afterwards.
    """
    family = family_said(content, overrides)
    model_type = (overrides if isinstance(overrides, Mapping) else {}).get("model_type", content.get("model_type"))
    if family is None or family.model_type != model_type or not isinstance(content.get("auto_map") or {}, Mapping):
        return None
    config: PretrainedConfig = resolve_name(family.config_class).from_dict(
        {**content, "architectures": [family.architecture]}
    )
    return config


def check_flags(args: EngineArgs, model_config: ModelConfig) -> None:
    """Refuse flags that vLLM sets by itself or takes otherwise, where the user gave them and they do not fit.

    Raises: ConfigError.
    """
    if not is_ours(model_config):
        return
    settings_in(args.additional_config)
    for name in ("max_num_batched_tokens", "max_num_seqs"):
        value = getattr(args, name)
        if value is not None and (type(value) is not int or value < 1):
            raise ConfigError(f"{name} is {value!r}, allowed are whole numbers from 1 on; give one or leave it out")
    if args.kv_cache_dtype not in KV_CACHE_DTYPES:
        raise ConfigError(_KV_CACHE_DTYPE.format(args.kv_cache_dtype))
    if args.diffusion_config:
        raise ConfigError(
            f"diffusion_config is {args.diffusion_config}, but it is for vLLM's own diffusion models; remove "
            "--diffusion-config, and give additional_config.dllm.block_length instead"
        )
    if args.enable_prefix_caching and not _is_block_causal(model_config):
        raise ConfigError(
            "enable_prefix_caching is on, but the K/V of a bidirectional model depend on what follows the prefix; "
            "allowed is off; remove --enable-prefix-caching"
        )
    if args.enable_chunked_prefill:
        raise ConfigError(
            "enable_chunked_prefill is on, but a diffusion model takes its whole prompt at once; allowed is off; "
            "remove --enable-chunked-prefill"
        )
    given, least = args.max_num_batched_tokens, max(model_config.max_model_len, args.max_num_seqs or 0)
    if given is not None and given < least:  # vLLM refuses it before `set_step_sizes`
        logger.info("Raising max_num_batched_tokens from %d to %d: max_model_len, or max_num_seqs", given, least)
        args.max_num_batched_tokens = least


class DllmConfigHook(VerifyAndUpdateConfig):
    """What vLLM calls while it builds the configuration of one of our models."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Mark the model as a diffusion model, and check its end tokens and the defaults of its requests.

        Raises: ConfigError for another family's `model_type`, and for special ids of generation configs that the
            vocabulary does not have.
        """
        become(model_config, DllmModelConfig)
        natives.check_model(served_family(model_config))
        _check_config_class(model_config)
        _check_generation_ids(model_config)
        model_config.hf_config.canvas_length = DllmConfig().block_length
        check_generation_defaults(model_config)

    @classmethod
    def verify_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Refuse what cannot work and set what diffusion needs.

        Raises: ConfigError with one sentence; UnsupportedVllmError where adapters are asked for and vLLM's are others.
        """
        for is_asked_for, sentence in _REFUSALS:
            if is_asked_for(vllm_config):
                raise ConfigError(sentence.format(c=vllm_config))
        if vllm_config.lora_config:
            check_contracts(LORA_CONTRACTS, str(SUPPORTED_VLLM))
        config = become_dllm(vllm_config)
        check_level()
        settings, spiffy = config.dllm.settings, config.dllm.spiffy
        family = served_family(vllm_config.model_config)
        natives.tell(family, vllm_config)
        check_family(settings, family)
        if max_prompt_len(settings, vllm_config.model_config.max_model_len) < 1:
            raise ConfigError(
                f"additional_config.dllm.block_length is {settings.block_length}, but max_model_len is "
                f"{vllm_config.model_config.max_model_len}, which leaves no room for a prompt; choose a smaller "
                "block_length"
            )
        num_positions = vllm_config.model_config.hf_config.num_positions
        if vllm_config.model_config.max_model_len > num_positions:
            raise ConfigError(
                f"max_model_len is {vllm_config.model_config.max_model_len}, but config.json has rotary positions up "
                f"to {num_positions}; allowed are up to this number; lower --max-model-len or raise "
                "max_position_embeddings, or the factor of rope_parameters, with --hf-overrides"
            )
        if settings.is_aligned:
            set_page_size(vllm_config, settings.block_length)
        set_attention(config, settings)
        set_worker(vllm_config)
        compile_nothing(vllm_config)
        set_step_sizes(vllm_config, settings, spiffy)
        # vLLM's kernel warm-up steps requests with sampling parameters that are refused here (penalties, logprobs),
        # past the end of their generation; without it the runner's few Triton kernels compile in the first request.
        vllm_config.kernel_config.enable_jit_warmup = False
        defaults = family_defaults(vllm_config.model_config)
        logger.info(
            "Serving %s by block diffusion: %s; with vllm-dllm's own scheduler, nothing is compiled by torch.compile%s",
            vllm_config.model_config.architectures[0],
            settings.model_dump_json(),
            f"; requests get {dict(defaults)}, the family's defaults, unless they say otherwise" if defaults else "",
        )
        if spiffy:
            _tell_spiffy(spiffy)


def set_worker(vllm_config: VllmConfig) -> None:
    """Name our worker for the device. Raises: ConfigError where there is none."""
    if current_platform.is_cpu():
        vllm_config.parallel_config.worker_cls = WORKERS[0]
    elif current_platform.is_cuda_alike():
        vllm_config.parallel_config.worker_cls = WORKERS[1]
    else:
        raise ConfigError(
            f"the device is {current_platform.device_type!r}, but diffusion models have workers for a CPU and for GPUs "
            "of CUDA and ROCm; run them there"
        )


def _check_config_class(model_config: ModelConfig) -> None:
    """Check that the configuration is of the family that `architectures` name. Raises: ConfigError."""
    family, config = served_family(model_config), model_config.hf_config
    if not isinstance(config, resolve_name(family.config_class)):
        raise ConfigError(
            f"model_type in the checkpoint's config.json is {config.model_type!r}, but architectures name "
            f"{family.architecture}; allowed is {family.model_type!r}; correct one of them there"
        )


def _check_generation_ids(model_config: ModelConfig) -> None:
    """Check what config.json's own class does not see. Raises: ConfigError."""
    generation = {
        "the checkpoint's generation_config.json": model_config.try_get_generation_config(),
        "--override-generation-config": model_config.override_generation_config,
    }
    for where, given in generation.items():
        ids = {name: given[name] for name in SPECIAL_IDS if given.get(name) is not None}
        check_token_ids(ids, model_config.hf_config.vocab_size, where)


def _tell_spiffy(spiffy: SpiffySettings) -> None:
    logger.info(
        "Spiffy: %s, at most %d drafts per step, budget %s, tokens are %s",
        spiffy.drafts,
        spiffy.max_nodes,
        "auto" if spiffy.budget is None else spiffy.budget,
        "exactly those without speculation" if spiffy.exactness == "exact" else "near those without speculation",
    )
    for warning in spiffy.warnings:
        logger.warning("%s", warning)
