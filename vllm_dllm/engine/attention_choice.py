"""The choice of an attention implementation, at the start of an engine, and what follows from it."""

import time

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
from vllm_dllm.errors import KernelUnavailable
from vllm_dllm.names import AttentionName
from vllm_dllm.self_test.attention import AttentionShape
from vllm_dllm.self_test.check import Check
from vllm_dllm.self_test.decoding import DecodingShape
from vllm_dllm.self_test.isolated import NOT_BEGUN, Request, run_isolated

logger = init_logger("vllm.dllm")

PAGE_SIZE = 16
"""Positions per page where vLLM has not chosen yet; kernels take any."""


def set_attention(vllm_config: DllmVllmConfig, settings: DllmConfig) -> None:
    """Choose, tell, and put the choice into `additional_config`, where every process of the engine reads it.

    On a GPU kernels are compared with plain torch there first. An implementation without CUDA graphs turns these off.

    Raises: ConfigError and KernelUnavailable, as `choose_attention`; KernelUnavailable for a native op that is wrong.
    """
    setting = _setting(vllm_config)
    measure = None if current_platform.is_cpu() else SelfTest(vllm_config, settings, setting).attention
    choice = choose_attention(settings.attention, setting, measure)
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


class SelfTest:
    """The kernels at a server's shapes, compared in a process of its own: the GPU is not this process's to initialise.

    The native ops are compared along with the first implementation of attention that is.
    """

    def __init__(self, vllm_config: DllmVllmConfig, settings: DllmConfig, setting: Setting) -> None:
        model, parallel = vllm_config.model_config, vllm_config.parallel_config
        self._device_type = setting.device_type
        self._attention = AttentionShape(
            num_heads=model.get_num_attention_heads(parallel),
            num_kv_heads=model.get_num_kv_heads(parallel),
            head_dim=setting.head_dim,
            dtype=setting.dtype,
            kv_dtype=setting.kv_dtype,
            page_size=vllm_config.cache_config.block_size or PAGE_SIZE,
            block_length=settings.block_length,
            max_len=model.max_model_len,
        )
        self._decoding: DecodingShape | None = DecodingShape(
            model.get_vocab_size(), settings.block_length, setting.dtype, vllm_config.dllm.rules
        )

    def attention(self, name: AttentionName) -> list[Check]:
        """Compare an implementation.

        Raises: KernelUnavailable for native ops that are wrong: no setting chooses another one.
        """
        begin = time.perf_counter()
        checks = run_isolated(Request(self._device_type, (name, self._attention), self._decoding))
        logger.info("Self-test (%.1f s): %s", time.perf_counter() - begin, "; ".join(map(str, checks)))
        its = [check for check in checks if check.kernel.startswith("attention")]
        died = next((check for check in checks if check.kernel == NOT_BEGUN), None)
        if died is not None:
            raise KernelUnavailable(
                f"the self-test of vllm-dllm's kernels, a process of its own on this device, compared nothing: it "
                f"{died.case}; see what keeps it from the device, with `vllm-dllm doctor --self-test`"
            )
        wrong = [str(check) for check in checks if check not in its and not check.agrees]
        if wrong:
            raise KernelUnavailable(
                f"vllm-dllm's native ops disagree with plain torch on this device ({'; '.join(wrong)}); report it with "
                "what `vllm-dllm doctor --self-test` prints; with VLLM_DLLM_LIBRARY=none none of them is used"
            )
        self._decoding = None
        return its


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
