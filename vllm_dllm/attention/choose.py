"""Which implementation of attention serves: decided once, by what each declares to support and what is installed."""

from dataclasses import dataclass

from vllm_dllm.attention.csrc import CsrcAttention
from vllm_dllm.attention.flashinfer import FlashInferAttention
from vllm_dllm.attention.interface import Attention, Setting
from vllm_dllm.attention.plain import PlainAttention
from vllm_dllm.attention.vllm_flash import VllmFlashAttention
from vllm_dllm.attention.xformers import XformersAttention
from vllm_dllm.config import AttentionName
from vllm_dllm.errors import ConfigError, KernelUnavailable
from vllm_dllm.ops.library import cpu_isa

IMPLEMENTATIONS: dict[AttentionName, type[Attention]] = {
    "csrc": CsrcAttention,
    "vllm": VllmFlashAttention,
    "flashinfer": FlashInferAttention,
    "xformers": XformersAttention,
    "torch": PlainAttention,
}

ORDER: dict[str, tuple[AttentionName, ...]] = {
    "cpu": ("csrc", "torch"),
    "cuda": ("csrc", "vllm", "flashinfer", "xformers"),
}
"""By device, what `auto` tries; on a GPU `torch` is for who asks for it, since it is several times slower."""


@dataclass(frozen=True, slots=True)
class Choice:
    """An implementation, and why it was chosen."""

    name: AttentionName
    label: str  # the name, with what the kernel was compiled for
    reason: str


def choose_attention(asked: AttentionName, setting: Setting) -> Choice:
    """Choose an implementation.

    Args:
        asked: the setting `additional_config.dllm.attention`.
        setting: what it has to serve.

    Raises:
        ConfigError: the implementation asked for does not support the setting.
        KernelUnavailable: it is not installed, or `auto` finds none; with the command that mends it.
    """
    if asked != "auto":
        return _named(asked, setting)
    order = ORDER[setting.device_type]
    refusals: list[str] = []
    for name in order:
        refusal = _refusal(name, setting)
        if refusal is None:
            reason = "; ".join(refusals) or f"the first of {', '.join(order)}"
            return Choice(name, _label(name, setting), reason)
        refusals.append(f"{name}: {refusal}")
    raise KernelUnavailable(
        f"additional_config.dllm.attention is 'auto', but none of {', '.join(order)} works here: "
        f"{'; '.join(refusals)}; mend one of them, or set it to 'torch', which is slow"
    )


def _named(name: AttentionName, setting: Setting) -> Choice:
    implementation = IMPLEMENTATIONS[name]
    unsupported = implementation.support.refusal(setting)
    if unsupported:
        raise ConfigError(
            f"additional_config.dllm.attention is {name!r}, but {unsupported}; change that or choose 'auto'"
        )
    missing = implementation.unavailable(setting)
    if missing:
        raise KernelUnavailable(f"additional_config.dllm.attention is {name!r}, but {missing}")
    return Choice(name, _label(name, setting), "as set")


def _refusal(name: AttentionName, setting: Setting) -> str | None:
    implementation = IMPLEMENTATIONS[name]
    return implementation.support.refusal(setting) or implementation.unavailable(setting)


def _label(name: AttentionName, setting: Setting) -> str:
    if name != "csrc":
        return name
    if setting.capability is not None:
        return f"csrc (sm_{setting.capability[0]}{setting.capability[1]})"
    return f"csrc ({cpu_isa()})"
