"""What vLLM's configuration classes raise for one of our models, in the names of the settings and of config.json."""

import json
import re
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from vllm.engine.arg_utils import EngineArgs
from vllm.transformers_utils.repo_utils import try_get_local_file

from vllm_dllm.engine.explain import explain_validation
from vllm_dllm.errors import ConfigError
from vllm_dllm.models.interface import FAMILIES, ModelFamily, family_said

_ARGUMENTS = {"cache_dtype": "kv_cache_dtype", "policy": "scheduling_policy"}
"""Fields of vLLM's configuration -> the settings that they are made of, where the names differ."""

_TOO_LONG = re.compile(r"User-specified max_model_len \((\d+)\) .*?max_position_embeddings=(\d+)")


def explain(args: EngineArgs, error: Exception) -> ConfigError | None:
    """Return what is wrong with the settings or with config.json, or None where vLLM's own words are to stay.

    Whose model a file says it is comes first: another family would miss its fields, too.
    """
    ours = _ours(error)
    for model, content in _config_files(args):
        if not isinstance(content, Mapping):
            return ConfigError(
                f"config.json of {model} is {reprlib.repr(content)}; allowed is an object; put the checkpoint's own "
                "there"
            )
        overrides = args.hf_overrides if isinstance(args.hf_overrides, dict) else {}
        family = family_said(content, overrides) or _family_nearly_said({**content, **overrides})
        content = {**content, **overrides}
        if family is not None:
            found = _missing_file(args) or _wrong_field(model, content, family)
            found = found or ours
            return found or (_of_validation(args, error) if isinstance(error, ValidationError) else None)
    return ours


def _ours(error: Exception) -> ConfigError | None:
    """Return what we raised inside of pydantic's validation."""
    findings = error.errors() if isinstance(error, ValidationError) else []
    causes = [finding.get("ctx", {}).get("error") for finding in findings]
    return next((cause for cause in causes if isinstance(cause, ConfigError)), None)


def _config_files(args: EngineArgs) -> Iterator[tuple[str, object]]:
    for model in filter(None, (args.hf_config_path, args.model)):
        file = try_get_local_file(model, "config.json", args.revision)
        try:
            content = json.loads(file.read_bytes()) if isinstance(file, Path) else {}
        except ValueError:
            continue
        yield model, content


def _family_nearly_said(content: Mapping[str, Any]) -> ModelFamily | None:
    """Return the family of a file that names one of ours, in a field that has the wrong form or beside another name."""
    said = content.get("architectures")
    by_architecture = [f for f in FAMILIES if f.architecture == said]
    by_type = [f for f in FAMILIES if f.model_type == content.get("model_type") and f.remote_class is None]
    return next(iter(by_architecture + by_type), None)


def _missing_file(args: EngineArgs) -> ConfigError | None:
    path = args.hf_config_path
    if path is None or isinstance(try_get_local_file(path, "config.json", args.revision), Path):
        return None
    return ConfigError(
        f"hf_config_path is {path!r}, but config.json is not there; allowed is a folder that has one; correct "
        "--hf-config-path or leave it out"
    )


def _wrong_field(model: str, content: Mapping[str, Any], family: ModelFamily) -> ConfigError | None:
    allowed: dict[str, list[object]] = {"model_type": [family.model_type]}
    if family.remote_class is None:
        allowed["architectures"] = [[each.architecture] for each in FAMILIES if each.model_type == family.model_type]
    for name, values in allowed.items():
        if content.get(name) not in values:
            todo = family.other_files.get(str(content.get(name)), "correct it there or with --hf-overrides")
            return ConfigError(
                f"{name} in config.json of {model} is {reprlib.repr(content.get(name))}, but allowed is "
                f"{' or '.join(map(repr, values))}; {todo}"
            )
    if not isinstance(content.get("auto_map") or {}, Mapping):
        return ConfigError(
            f"auto_map in config.json of {model} is {reprlib.repr(content['auto_map'])}, but allowed is an object; "
            "remove it there"
        )
    return None


def _of_validation(args: EngineArgs, error: ValidationError) -> ConfigError:
    findings: list[dict[str, Any]] = [{**found, "loc": _named(found["loc"])} for found in error.errors()]
    # Of several the one that the user set: others may follow from it.
    of_user = [each for each in findings if each["loc"] and getattr(args, str(each["loc"][0]), None) == each["input"]]
    findings = of_user or findings
    (first, *_) = findings
    if first["loc"]:
        given = {each["loc"][0]: getattr(args, str(each["loc"][0]), each["input"]) for each in findings if each["loc"]}
        return ConfigError(explain_validation(findings, given).args[0])
    text = str(first.get("ctx", {}).get("error") or first["msg"])
    if too_long := _TOO_LONG.match(text):
        return ConfigError(
            f"max_model_len is {too_long[1]}, but config.json has rotary positions up to {too_long[2]}; allowed are up "
            "to this number; lower --max-model-len or raise max_position_embeddings, or the factor of rope_parameters, "
            "with --hf-overrides"
        )
    return ConfigError(text)


def _named(location: tuple[str | int, ...]) -> tuple[str | int, ...]:
    return tuple(_ARGUMENTS.get(str(key), key) for key in location[:1]) + location[1:]
