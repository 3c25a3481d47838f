"""What servers and requests may ask of windows that slide (`state.sliding`)."""

from collections.abc import Mapping

from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams

from vllm_dllm.additional_config import settings_in
from vllm_dllm.config import REQUEST_PREFIX, DllmConfig, RequestOptions
from vllm_dllm.engine.refusals import RequestError
from vllm_dllm.errors import ConfigError
from vllm_dllm.kv_settings import WINDOW_RULE, WINDOW_SETTINGS

_HARMLESS = ("stream", "speculation", "budget")
"""Options of requests besides: the first shows the window, the others bound its drafts."""


def check_windows(config: VllmConfig, settings: DllmConfig) -> None:
    """Check that nothing is asked for that windows cannot do, or that would have no effect. Raises: ConfigError."""
    given = settings_in(config.additional_config)
    if not settings.has_windows:
        if settings.position_penalty is not None:
            raise ConfigError(
                f"additional_config.dllm.position_penalty is {settings.position_penalty}, but the model "
                "has no windows; allowed is null; remove it"
            )
        return
    others = [name for name in given if name not in WINDOW_SETTINGS] if isinstance(given, Mapping) else []
    if others:
        raise ConfigError(
            f"additional_config.dllm has {', '.join(others)}, but the windows of this model are decided by "
            f"entropy_bound and position_penalty; allowed are {', '.join(WINDOW_SETTINGS)}; remove the others"
        )
    if config.scheduler_config.async_scheduling:
        raise ConfigError(
            "async_scheduling is on, but the host must know how many tokens of a window are final before it schedules "
            "the next step; allowed is off; remove --async-scheduling"
        )


def check_options(params: SamplingParams, options: RequestOptions) -> None:
    """Check that a request asks for nothing that its window ignores. Raises: RequestError."""
    if params.logprobs is not None:
        raise RequestError(
            f"logprobs is {params.logprobs}, but the windows of this model keep no log-probabilities of tokens that "
            "were unmasked before they came to the front; allowed is null; remove it",
            parameter="logprobs",
            value=params.logprobs,
        )
    for name, value in options.model_dump(exclude={*WINDOW_RULE, *_HARMLESS}, exclude_none=True).items():
        raise RequestError(
            f"{REQUEST_PREFIX}{name} is {value!r}, but this model decides a window, by the entropies of its positions; "
            f"allowed are {' and '.join(REQUEST_PREFIX + option for option in WINDOW_RULE)}; remove it",
            parameter=REQUEST_PREFIX + name,
            value=value,
        )
