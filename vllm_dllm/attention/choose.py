"""Which implementation of attention serves: decided once, by what each declares to support and what is installed."""

from collections.abc import Callable
from dataclasses import dataclass

from vllm_dllm.attention.csrc import CsrcAttention
from vllm_dllm.attention.flashinfer import FlashInferAttention
from vllm_dllm.attention.interface import Attention, Setting
from vllm_dllm.attention.plain import PlainAttention
from vllm_dllm.attention.vllm_flash import VllmFlashAttention
from vllm_dllm.attention.xformers import XformersAttention
from vllm_dllm.errors import ConfigError, KernelUnavailable
from vllm_dllm.names import AttentionName
from vllm_dllm.ops.library import cpu_isa
from vllm_dllm.self_test.check import Check, worst

Measure = Callable[[AttentionName], list[Check]]
"""Compares an implementation with plain torch where it will serve."""

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


def choose_attention(asked: AttentionName, setting: Setting, measure: Measure | None = None) -> Choice:
    """Choose an implementation: the one asked for, or the fastest that is there and agrees with plain torch.

    Args:
        asked: the setting `additional_config.dllm.attention`.
        setting: what it has to serve.
        measure: called for those that could serve, in turn; None: they are believed.

    Raises:
        ConfigError: the implementation asked for does not support the setting.
        KernelUnavailable: it is not installed or wrong here, or `auto` finds none; with the command that mends it.
    """
    if asked != "auto":
        return _named(asked, setting, measure)
    order = ORDER[setting.device_type]
    refusals: list[str] = []
    for name in order:
        refusal = _refusal(name, setting)
        checks = [] if refusal or measure is None else measure(name)
        refusal = refusal or _disagreement(checks)
        if refusal is None:
            reason = "; ".join(refusals) or f"the first of {', '.join(order)}"
            return Choice(name, _label(name, setting), reason + _measured(checks))
        refusals.append(f"{name}: {refusal}")
    raise KernelUnavailable(
        f"additional_config.dllm.attention is 'auto', but none of {', '.join(order)} works here: "
        f"{'; '.join(refusals)}; mend one of them, or set it to 'torch', which is slow"
    )


def _named(name: AttentionName, setting: Setting, measure: Measure | None) -> Choice:
    implementation = IMPLEMENTATIONS[name]
    unsupported = implementation.support.refusal(setting)
    if unsupported:
        raise ConfigError(
            f"additional_config.dllm.attention is {name!r}, but {unsupported}; change that or choose 'auto'"
        )
    missing = implementation.unavailable(setting)
    if missing:
        raise KernelUnavailable(f"additional_config.dllm.attention is {name!r}, but {missing}")
    checks = [] if measure is None else measure(name)
    wrong = _disagreement(checks)
    if wrong:
        raise KernelUnavailable(
            f"additional_config.dllm.attention is {name!r}, but {wrong}; choose 'auto' or another one, and report it "
            "with what `vllm-dllm doctor --self-test` prints"
        )
    return Choice(name, _label(name, setting), "as set" + _measured(checks))


def _disagreement(checks: list[Check]) -> str | None:
    """Return what of a self-test is wrong, as a clause; None if nothing is."""
    wrong = [check for check in checks if not check.agrees]
    return f"it disagrees with plain torch on this device ({worst(wrong)})" if wrong else None


def _measured(checks: list[Check]) -> str:
    """Return the figures of a self-test behind a reason."""
    return f"; against plain torch: {worst(checks)}" if checks else ""


def _refusal(name: AttentionName, setting: Setting) -> str | None:
    implementation = IMPLEMENTATIONS[name]
    return implementation.support.refusal(setting) or implementation.unavailable(setting)


def _label(name: AttentionName, setting: Setting) -> str:
    if name != "csrc":
        return name
    if setting.capability is not None:
        return f"csrc (sm_{setting.capability[0]}{setting.capability[1]})"
    return f"csrc ({cpu_isa()})"
