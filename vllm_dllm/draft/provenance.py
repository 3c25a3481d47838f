"""In what the calibration of a draft graph or a ranker differed from a server."""

import shlex
from pathlib import Path

from vllm_dllm.config import DllmConfig
from vllm_dllm.draft.graph_schema import ModelShape, Provenance
from vllm_dllm.policy_options import policy_settings


def fit_warnings(
    provenance: Provenance,
    settings: DllmConfig,
    *,
    where: str,
    model: str | None,
    family: str | None,
    shape: ModelShape | None,
    makes: str = "graph",
) -> list[str]:
    """Tell in what a calibration differed from a server; see `graph_file.check_fit`. `makes`: what it made."""
    made = _compared(provenance.settings, provenance.model, provenance.family, provenance.shape)
    here = _compared(settings, model, family, shape)
    if "shape" in made and "shape" in here and not (_is_hub_name(provenance.model) and model and _is_hub_name(model)):
        del made["model"]
    command = calibrate_command(settings, model) + (" --ranker RANKER.safetensors" if makes == "ranker" else "")
    return [
        f"{where} was calibrated with {name} {made[name]!r} but is used with {value!r}, so fewer drafts may be "
        f"accepted; for a {makes} of this server run: {command}"
        for name, value in here.items()
        if name in made and made[name] != value
    ]


def _is_hub_name(model: str) -> bool:
    return model.count("/") == 1 and not model.startswith((".", "/", "~")) and not Path(model).exists()


def _compared(
    settings: DllmConfig, model: str | None, family: str | None, shape: ModelShape | None
) -> dict[str, object]:
    names = {"model": model and Path(model).name, "family": family, "shape": shape and str(shape)}
    return {name: value for name, value in names.items() if value} | decoding_settings(settings)


def decoding_settings(settings: DllmConfig) -> dict[str, object]:
    """Return the settings that decide which drafts come true: the policy's own parameters, not those it ignores."""
    values: dict[str, object] = settings.model_dump(
        include={"block_length", "policy", *policy_settings(settings.policy)}
    )
    if "steps_per_block" in values:
        values["steps_per_block"] = settings.steps_per_block or settings.block_length
    if "alg_temp" in values:
        values["alg_temp"] = settings.alg_temp or 0.0
    return values


def calibrate_command(settings: DllmConfig, model: str | None) -> str:
    """Return the command that makes a graph for a server."""
    options = settings.model_dump(
        include={"block_length", "policy", *policy_settings(settings.policy)}, exclude_none=True
    )
    words = [
        f"--parameter {name}={value:g}" if name in settings.parameters else f"--{name.replace('_', '-')} {value}"
        for name, value in options.items()
    ]
    name = shlex.quote(model) if model else "MODEL"
    return f"vllm-dllm calibrate {name} --prompts PROMPTS.jsonl {' '.join(words)} --output FILE"
