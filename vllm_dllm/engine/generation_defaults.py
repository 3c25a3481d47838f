"""Sampling parameters of requests that do not name them: the family's, the checkpoint's file's and the user's."""

import json
import reprlib
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

from transformers import GenerationConfig
from vllm.config import ModelConfig
from vllm.exceptions import VLLMClientError
from vllm.logger import init_logger
from vllm.sampling_params import SamplingParams
from vllm.transformers_utils.repo_utils import get_hf_file_bytes

from vllm_dllm.engine.refusals import refuse_unsupported
from vllm_dllm.errors import STRICT_LIKENESS, ConfigError, nearest
from vllm_dllm.models.checkpoint_fields import SPECIAL_IDS
from vllm_dllm.models.interface import family_of

logger = init_logger("vllm.dllm")

SAMPLING_NAMES = {
    **{f"{kind}_penalty": f"{kind}_penalty" for kind in ("repetition", "presence", "frequency")},
    **{name: name for name in ("temperature", "top_k", "top_p", "min_p")},
    "max_new_tokens": "max_tokens",
}
"""What vLLM takes from a generation config -> the sampling parameter."""

_FILE = "generation_config.json"


def family_defaults(model_config: ModelConfig) -> Mapping[str, object]:
    """Return a family's published defaults that neither the checkpoint's file nor the user names.

    None of a model that is not ours, and none where the user leaves out the checkpoint's file or gives another.
    """
    family = family_of(model_config.architectures)
    if family is None or model_config.generation_config != "auto":
        return {}
    said = {**model_config.try_get_generation_config(), **model_config.override_generation_config}
    return {name: value for name, value in family.generation_defaults.items() if said.get(name) is None}


def read_generation_config(model_config: ModelConfig, read: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what a generation config says, of a model of ours only from a file that transformers can read.

    vLLM passes over one that is no JSON, and ends with whatever transformers raises for others. With
    --generation-config vllm it still takes the special token ids.

    Args:
        model_config: of any model.
        read: vLLM's own reading.

    Raises: ConfigError naming the file and the field.
    """
    if family_of(model_config.architectures) is None:
        return read()
    source = model_config.generation_config
    is_own = source in ("auto", "vllm")
    folder = (model_config.hf_config_path or model_config.model) if is_own else source
    revision = (model_config._hf_config_revision or model_config.revision) if is_own else None
    text = _file_of(folder, revision)
    if text is None and not is_own:
        raise ConfigError(
            f"generation_config is {source!r}, but {_FILE} is not there; allowed are 'auto' (the checkpoint's), 'vllm' "
            "(none), and a folder or a repository that has one; correct --generation-config"
        )
    problem, content = (None, {}) if text is None else _problem(text)
    if problem is None:
        return read()
    if source == "vllm":
        return {name: content[name] for name in SPECIAL_IDS if name in content}
    raise ConfigError(
        f"{problem[0]}{_FILE} of {folder} {problem[1]}; correct it there or leave the file out with "
        "--generation-config vllm"
    )


def _file_of(folder: str, revision: str | None) -> bytes | None:
    try:
        return get_hf_file_bytes(_FILE, folder, revision)
    except (OSError, ValueError):  # no folder, and no name or no access either
        return None


def _problem(text: bytes) -> tuple[tuple[str, str] | None, dict[str, Any]]:
    """Return why a file cannot be read, as the words before and behind its name, or None; and its fields."""
    try:
        content = json.loads(text.decode())
    except ValueError as error:
        return ("", f"is no JSON ({error}); allowed is an object"), {}
    if not isinstance(content, dict):
        return ("", f"is {reprlib.repr(content)}; allowed is an object"), {}
    refusal = _refusal(content)
    if refusal is None:
        return None, content
    for name, value in content.items():
        alone = _refusal({name: value})
        if alone is not None:
            return (f"{name} in ", f"is {reprlib.repr(value)}, which transformers refuses{alone}"), content
    return ("", f"has fields that do not go together{refusal}"), content


def _refusal(fields: dict[str, Any]) -> str | None:
    """Return what transformers says against fields, in brackets, which may be nothing; None where it takes them."""
    try:
        GenerationConfig(**fields).to_diff_dict()
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        return f" ({error})" if type(error) is ValueError else ""
    return None


def check_generation_defaults(model_config: ModelConfig) -> None:
    """Keep away defaults that every request would be refused for, and those that none would get.

    What the checkpoint's file says is then left out, with a warning; what the user says is an error. A file may have
    fields that vLLM does not read, as those of other libraries.

    Args:
        model_config: of a model of ours; its `override_generation_config` is changed.

    Raises: ConfigError.
    """
    source, override = model_config.generation_config, model_config.override_generation_config
    in_file = {} if source == "vllm" else model_config.try_get_generation_config()
    _refuse_unread(override)
    family = family_of(model_config.architectures)
    for name in SAMPLING_NAMES:
        value = override.get(name, in_file.get(name))
        reason = None if value is None else _reason(name, value)
        if reason and name in override:
            raise ConfigError(
                f"override_generation_config.{name} is {value!r}, but requests without a {name} of their own could not "
                f"be served: {reason}; remove it from --override-generation-config"
            )
        if reason:
            instead = family.generation_defaults.get(name) if family and source == "auto" else None
            logger.warning(
                "%s of %s: %s is %r, and is left out: %s. Requests get %s. --generation-config vllm leaves out the "
                "whole file",
                *(_FILE, model_config.model if source == "auto" else source, name, value, reason),
                "vLLM's default" if instead is None else f"{instead}, the family's default",
            )
            override[name] = None


def _refuse_unread(override: Mapping[str, object]) -> None:
    known = (*SAMPLING_NAMES, *SPECIAL_IDS)
    by_parameter = {parameter: name for name, parameter in SAMPLING_NAMES.items()}
    for name, value in override.items():
        if value is not None and name not in known:
            meant = by_parameter.get(name) or nearest(name, known, STRICT_LIKENESS)
            raise ConfigError(
                f"override_generation_config.{name} is {reprlib.repr(value)}, but no request would get it; allowed are "
                f"{', '.join(known)}; {f'did you mean {meant!r}?' if meant else 'remove it'}"
            )


def _reason(name: str, value: object) -> str | None:
    """Tell why a default cannot be served, or None."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return "allowed are numbers"
    try:
        refuse_unsupported(SamplingParams.from_optional(**{SAMPLING_NAMES[name]: value}))
    except (VLLMClientError, ValueError, TypeError) as error:
        return str(error.args[0] if error.args else error).split(";", 1)[0].rstrip(".")
    return None
