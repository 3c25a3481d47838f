"""Options that are settings of a server, and the settings that they make with those that a model publishes."""

from collections.abc import Iterable, Mapping
from pkgutil import resolve_name
from typing import Annotated, Any

import typer

from vllm_dllm.blocks import row_blocks
from vllm_dllm.cli.inputs import family_for, read_config
from vllm_dllm.config import DllmConfig, parse_server_settings
from vllm_dllm.errors import ConfigError, did_you_mean
from vllm_dllm.models.interface import ModelFamily
from vllm_dllm.policy_options import policy_names
from vllm_dllm.unmask.registry import file_options


def _policy(name: str) -> str:
    if name not in policy_names():
        todo = did_you_mean(name, policy_names(), "give one of these")
        raise typer.BadParameter(f"{name!r}, allowed are {', '.join(policy_names())}; {todo}")
    return name


def _policies_like(begun: str) -> list[str]:
    return [name for name in policy_names() if name.startswith(begun)]


_CREDIT = ("credit_alpha", "credit_beta", "credit_gamma")


def _credit(text: str) -> str:
    """Check an option with the three numbers of the policy `credit`."""
    try:
        numbers = [float(number) for number in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != len(_CREDIT):
        raise typer.BadParameter(f"{text!r}, allowed are three numbers with commas between them, as '0.7,0.8,0.2'")
    return text


Policy = Annotated[
    str | None,
    typer.Option(
        parser=_policy,
        metavar="POLICY",
        autocompletion=_policies_like,
        help=f"Of the server; the model's own unless given: {', '.join(policy_names())}.",
    ),
]
Threshold = Annotated[float | None, typer.Option(help="Of the policies `threshold` and `dynamic`.")]
Factor = Annotated[float | None, typer.Option(help="Of the policy `factor`.")]
EntropyBound = Annotated[
    float | None, typer.Option(help="Of the policy `entropy_bounded`, and of windows that slide (WeDLM).")
]
Credit = Annotated[
    str | None,
    typer.Option(parser=_credit, metavar="ALPHA,BETA,GAMMA", help="Of the policy `credit`, three numbers with commas."),
]
AlgTemp = Annotated[float | None, typer.Option(help="Of the policies `static`, `margin` and `entropy`.")]
StepsPerBlock = Annotated[int | None, typer.Option(help="Of the policies with a schedule.")]
BlockLength = Annotated[int | None, typer.Option(help="Positions denoised together; the model's own unless given.")]


def _parameter(text: str) -> str:
    """Check an option that is a parameter of a policy in torch code."""
    name, sign, value = text.partition("=")
    try:
        _value(name, value)
    except ValueError:
        sign = ""
    if not (name and sign):
        raise typer.BadParameter(
            f"{text!r}, allowed are a name and a number, as 'local_leap_radius=4', or a policy's net, as "
            "'learn2pd_file=net.safetensors'"
        )
    return text


def _value(name: str, text: str) -> object:
    return text if name in file_options() else float(text)


Parameters = Annotated[
    list[str] | None,
    typer.Option(
        "--parameter", parser=_parameter, metavar="NAME=VALUE", help="Of a policy in torch code (docs/policies.md)."
    ),
]


def given_settings(
    policy: str | None,
    block_length: int | None,
    threshold: float | None,
    factor: float | None,
    entropy_bound: float | None,
    credit: str | None,
    alg_temp: float | None,
    steps_per_block: int | None,
) -> dict[str, object]:
    """Return the fields of `DllmConfig` that options have a value for."""
    values = {
        "policy": policy,
        "block_length": block_length,
        "threshold": threshold,
        "factor": factor,
        "entropy_bound": entropy_bound,
        **({} if credit is None else dict(zip(_CREDIT, map(float, credit.split(",")), strict=True))),
        "alg_temp": alg_temp,
        "steps_per_block": steps_per_block,
    }
    return {name: value for name, value in values.items() if value is not None}


def given_parameters(parameters: list[str] | None) -> dict[str, object]:
    """Return the parameters of policies in torch code that an option has a value for."""
    return {name: _value(name, value) for name, _, value in (each.partition("=") for each in parameters or ())}


def option_of(setting: str) -> str:
    """Return the option that gives a setting, which may be a parameter of a policy in torch code."""
    if setting in _CREDIT:
        return "--credit"
    return f"--{setting.replace('_', '-')}" if setting in DllmConfig.model_fields else f"--parameter {setting}"


def server_settings(model: str, given: Mapping[str, object]) -> DllmConfig:
    """Return the settings given as options; what is not given is as the model publishes it.

    Args:
        model: name or path.
        given: field of `DllmConfig` -> value.

    Raises: ConfigError for a model that cannot be read or is none of ours, and for values that are not allowed.
    """
    config = read_config(model)
    return settings_of(config, family_for(model, config), given)


def settings_of(config: Mapping[str, Any], family: ModelFamily, given: Mapping[str, object]) -> DllmConfig:
    """Return the same as `server_settings` for a model whose config.json was read.

    Raises: ConfigError for values that are not allowed, and for a config.json that its tokens that edit cannot be
        read from.
    """
    # Whether there are any, and which, the configuration class knows: a file of a published vocabulary names none.
    edit_ids = resolve_name(family.config_class).from_dict(dict(config)).edit_ids if family.edit_defaults else None
    published = family.settings(config.get(family.block_size_name), edit_ids)
    return parse_server_settings(given, prefix="--", defaults=published)


def num_positions(model: str) -> int:
    """Return how many positions a sequence of a model has at most.

    Args:
        model: name or path.

    Raises: ConfigError for a model that cannot be read, is none of ours, or has a config.json that is refused.
    """
    config = read_config(model)
    config_class = resolve_name(family_for(model, config).config_class)
    return int(config_class.from_dict(config).num_positions)


def check_gen_length(gen_length: int, prompt_lens: Iterable[int], settings: DllmConfig, positions: int) -> None:
    """Check that prompts and what they generate have room in a model's sequences; an engine would cut the generation.

    Args:
        gen_length: tokens to generate per prompt.
        prompt_lens: tokens of each prompt.
        settings: of the server.
        positions: of a sequence, at most.

    Raises: ConfigError.
    """
    for prompt_len in prompt_lens:
        most = row_blocks(prompt_len, positions, settings, positions).end - prompt_len
        if gen_length > most:
            todo = f"allowed are 1..{most}; choose a smaller one" if most > 0 else "leave out the longest prompts"
            raise ConfigError(
                f"--gen-length is {gen_length}, but the model has room for {positions} tokens, in blocks of "
                f"{settings.block_length}, and a prompt takes {prompt_len} of it; {todo}"
            )
