"""The choice of an attention implementation, at the start of an engine, and what follows from it."""

from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype

from vllm_dllm.attention import varlen
from vllm_dllm.attention.choose import IMPLEMENTATIONS, choose_attention
from vllm_dllm.attention.interface import Setting
from vllm_dllm.config import DllmConfig
from vllm_dllm.engine.configs import DllmVllmConfig

logger = init_logger("vllm.dllm")


def set_attention(vllm_config: DllmVllmConfig, settings: DllmConfig) -> None:
    """Choose, tell, and put the choice into `additional_config`, where every process of the engine reads it.

    An implementation without CUDA graphs turns them off.

    Raises: ConfigError and KernelUnavailable, as `choose_attention`.
    """
    setting = _setting(vllm_config)
    choice = choose_attention(settings.attention, setting)
    logger.info("Attention: %s: %s", choice.label, choice.reason)
    if choice.name == "csrc" and setting.device_type == "cuda":
        refusal = varlen.refusal(setting)
        by = "FlashAttention of vLLM" if refusal is None else f"csrc: {refusal}"
        logger.info("Attention of refreshes and prefills without context: %s", by)
    given = vllm_config.additional_config
    assert isinstance(given, dict), "settings_in refuses others"
    vllm_config.additional_config = {**given, "dllm": {**given.get("dllm", {}), "attention": choice.name}}
    vllm_config.dllm = vllm_config.dllm.with_attention(choice.name)
    compilation = vllm_config.compilation_config
    if not IMPLEMENTATIONS[choice.name].support.cuda_graphs and compilation.cudagraph_mode != CUDAGraphMode.NONE:
        if not current_platform.is_cpu():
            logger.info("CUDA graphs are off: attention by %s cannot be captured", choice.name)
        compilation.cudagraph_mode = CUDAGraphMode.NONE


def _setting(vllm_config: VllmConfig) -> Setting:
    model_config, cache_config = vllm_config.model_config, vllm_config.cache_config
    capability = current_platform.get_device_capability()
    return Setting(
        device_type=current_platform.device_type,
        capability=None if capability is None else (capability.major, capability.minor),
        dtype=model_config.dtype,
        kv_dtype=kv_cache_dtype_str_to_dtype(cache_config.cache_dtype, model_config),
        head_dim=model_config.get_head_size(),
        page_size=cache_config.block_size if cache_config.user_specified_block_size else None,
    )
