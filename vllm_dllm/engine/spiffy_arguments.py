"""A `speculative_config` of method `spiffy`: how it gets past vLLM, whose own class admits only its own methods."""

import reprlib
from collections.abc import Mapping

from vllm.config import ModelConfig
from vllm.engine.arg_utils import EngineArgs

from vllm_dllm.additional_config import mode_in
from vllm_dllm.engine.compat import SPECULATIVE_METHODS
from vllm_dllm.engine.configs import is_ours
from vllm_dllm.errors import ConfigError, did_you_mean, nearest
from vllm_dllm.models.interface import FAMILY_BY_ARCHITECTURE
from vllm_dllm.spiffy_config import METHOD, field_names, parse_spiffy, read_speculative_config, to_json_object

_TAKEN = "_vllm_dllm_spiffy"
"""Where arguments remember what `take_spiffy` made of them."""


def take_spiffy(args: EngineArgs, model_config: ModelConfig) -> bool:
    """Move a `speculative_config` of method `spiffy` to `additional_config`, and leave others to vLLM.

    vLLM's own class admits only its own methods. What the user gave is not changed, so that `args` can be used again.

    Returns: whether there was one.

    Raises: ConfigError for method `spiffy` with another's model, for another method with a model of ours, and for
        settings that do not pass.
    """
    if isinstance(args.additional_config, dict) and METHOD in args.additional_config and is_ours(model_config):
        if args.additional_config[METHOD] is not getattr(args, _TAKEN, None):
            raise ConfigError(
                f"additional_config.{METHOD} is {reprlib.repr(args.additional_config[METHOD])}, but it is made of "
                "speculative_config; allowed is none; remove it and give speculative_config"
            )
        args.additional_config = {k: v for k, v in args.additional_config.items() if k != METHOD}  # of an earlier call
    given = read_speculative_config(args.speculative_config)
    aliases = {"method": args.spec_method, "model": args.spec_model, "num_speculative_tokens": args.spec_tokens}
    aliases = {name: value for name, value in aliases.items() if value is not None}
    if given is None and not aliases:
        return False
    fields = given if isinstance(given, Mapping) else {}
    method = aliases.get("method", fields.get("method"))
    if not is_ours(model_config):
        _refuse_for_others(method, model_config)
        args.speculative_config = given
        return False
    if mode_in(args.additional_config) == "self_speculation":
        raise ConfigError(
            f"speculative_config is {reprlib.repr(given)}, but additional_config.dllm.mode is 'self_speculation', "
            "which makes drafts of its own; allowed is none; remove --speculative-config or the mode"
        )
    fields = field_names(fields)
    if method != METHOD or fields.get("method", METHOD) != METHOD:
        otherwise = f"allowed is method {METHOD!r}; set it or remove --speculative-config"
        if method is None and (meant := nearest("method", fields)):
            otherwise = f"{meant!r} is not known, did you mean 'method'?"
        raise ConfigError(
            f"speculative_config is {reprlib.repr(given)} with method {method!r}, but a diffusion model unmasks in any "
            f"order, where others than {METHOD!r} draft left to right; {did_you_mean(method, [METHOD], otherwise)}"
        )
    if args.per_request_spec_decode_metrics != "none":
        raise ConfigError(
            f"per_request_spec_decode_metrics is {args.per_request_spec_decode_metrics!r}, but it counts drafts that "
            "go left to right; allowed is 'none'; remove it and read kv_transfer_params of the replies"
        )
    config = to_json_object(parse_spiffy(fields | aliases))
    args.additional_config = {**args.additional_config, METHOD: config}
    setattr(args, _TAKEN, config)
    return True


def _refuse_for_others(method: object, model_config: ModelConfig) -> None:
    """Refuse method `spiffy`, and typos of it, for a model that is not ours."""
    if method == METHOD:
        raise ConfigError(
            f"speculative_config.method is {METHOD!r}, but {', '.join(model_config.architectures)} is not a "
            f"diffusion model; allowed are {', '.join(FAMILY_BY_ARCHITECTURE)}; choose another method"
        )
    if nearest(method, [*SPECULATIVE_METHODS, METHOD]) == METHOD:
        raise ConfigError(
            f"speculative_config.method is {method!r}, which neither vLLM nor vllm-dllm knows; allowed are "
            f"{', '.join(SPECULATIVE_METHODS)}, and {METHOD!r} for diffusion models; did you mean {METHOD!r}?"
        )
