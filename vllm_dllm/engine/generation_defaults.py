"""Sampling parameters of requests that do not name them: the family's, the checkpoint's file's and the user's."""

from collections.abc import Mapping

from vllm.config import ModelConfig
from vllm.exceptions import VLLMClientError
from vllm.logger import init_logger
from vllm.sampling_params import SamplingParams

from vllm_dllm.engine.refusals import refuse_unsupported
from vllm_dllm.errors import ConfigError
from vllm_dllm.models.interface import family_of

logger = init_logger("vllm.dllm")

_NAMES = {
    **{f"{kind}_penalty": f"{kind}_penalty" for kind in ("repetition", "presence", "frequency")},
    **{name: name for name in ("temperature", "top_k", "top_p", "min_p")},
    "max_new_tokens": "max_tokens",
}
"""What vLLM takes from a generation config -> the sampling parameter."""


def family_defaults(model_config: ModelConfig) -> Mapping[str, object]:
    """Return a family's published defaults that neither the checkpoint's file nor the user names.

    None of a model that is not ours, and none where the user leaves out the checkpoint's file or gives another.
    """
    family = family_of(model_config.architectures)
    if family is None or model_config.generation_config != "auto":
        return {}
    named = {**model_config.try_get_generation_config(), **model_config.override_generation_config}
    return {name: value for name, value in family.generation_defaults.items() if name not in named}


def check_generation_defaults(model_config: ModelConfig) -> None:
    """Keep away defaults that every request would be refused for.

    What the checkpoint's file says is then left out, with a warning; what the user says is an error.

    Args:
        model_config: of a model of ours; its `override_generation_config` is changed.

    Raises: ConfigError.
    """
    source, override = model_config.generation_config, model_config.override_generation_config
    in_file = {} if source == "vllm" else model_config.try_get_generation_config()
    for name in _NAMES:
        value = override.get(name, in_file.get(name))
        reason = None if value is None else _reason(name, value)
        if reason and name in override:
            raise ConfigError(
                f"override_generation_config.{name} is {value!r}, but requests without a {name} of their own could not "
                f"be served: {reason}; remove it from --override-generation-config"
            )
        if reason:
            logger.warning(
                "generation_config.json of %s: %s is %r, and is left out: %s. Requests get vLLM's default. "
                "--generation-config vllm leaves out the whole file",
                *(model_config.model if source == "auto" else source, name, value, reason),
            )
            override[name] = None


def _reason(name: str, value: object) -> str | None:
    """Tell why a default cannot be served, or None."""
    try:
        refuse_unsupported(SamplingParams.from_optional(**{_NAMES[name]: value}))
    except (VLLMClientError, ValueError, TypeError) as error:
        return str(error.args[0] if error.args else error).split(";", 1)[0].rstrip(".")
    return None
