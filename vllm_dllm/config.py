"""Settings of a server and options of a request; what a request may ask of a server is in `request_checks`.

A server reads `additional_config={"dllm": {...}}` (`--additional-config '{"dllm": {...}}'`); a request may override
the unmasking policy through `SamplingParams.extra_args` (`vllm_xargs` over HTTP) with keys like `dllm_policy`, see
`RequestOptions`. Nothing here imports vLLM or torch.
"""

import re
import reprlib
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from vllm_dllm.errors import STRICT_LIKENESS, ConfigError, did_you_mean, nearest
from vllm_dllm.kv_settings import STRICT, Count, KvSettings
from vllm_dllm.names import AttentionName, KvPolicyName, ServedMode
from vllm_dllm.policy_options import WithParameters, allowed_policies, known_policy

REQUEST_PREFIX = "dllm_"

# Each type's description says what is allowed, in error messages.
_Policy = Annotated[str, BeforeValidator(known_policy), Field(description="the names of policies")]
_Threshold = Annotated[float, Field(gt=0.0, le=1.0, description="numbers above 0 and up to 1")]
_Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False, description="finite numbers above 0")]
_AlgTemp = Annotated[float, Field(ge=0.0, allow_inf_nan=False, description="null and finite numbers from 0 on")]
_Gain = Annotated[float, Field(gt=0.0, le=100.0, description="numbers above 0 and up to 100")]
_CfgScale = Annotated[float, Field(ge=0.0, le=100.0, description="null and numbers from 0 to 100")]
_Decay = Annotated[float, Field(ge=0.0, le=1.0, description="numbers from 0 to 1")]
_Horizon = Annotated[int, Field(ge=1, le=1 << 20, description="null and whole numbers from 1 to 1048576")]
_Attention = Annotated[AttentionName, Field(description="'auto', 'csrc', 'vllm', 'flashinfer', 'xformers' and 'torch'")]
_Given = Field(description="null, texts, and lists of token ids with null for what is to be generated")
_Penalty = Annotated[float, Field(ge=0.0, allow_inf_nan=False, description="null and finite numbers from 0 on")]


class DllmConfig(KvSettings, WithParameters):
    """Settings of a server; besides these the parameters of policies without a native twin (docs/policies.md).

    Attributes:
        block_length: positions denoised together (tokens).
        kv_policy: `dual` freezes the K/V of everything but the block, `prefix` of what precedes it
            (Fast-dLLM, arXiv:2505.22618), `freecache` the same, for good (FlashDLM, arXiv:2505.21467), `vicinity` of
            everything but the block and its neighbours (dInfer, arXiv:2510.08666), `dkv` of tokens from the step on
            that follows the one which unmasked them (dKV-Cache, arXiv:2505.15781), `dkv_pd` of these and of the prompt,
            for good; `block_causal`, for models that see nothing behind a block, never computes K/V again, nor do
            `causal`, for models whose final positions see those before them alone, and `window`, for those of them that
            decide a window of `block_length` positions, which slides (`state.sliding`).
        refresh_every: with `dual`, `dkv` and `dkv_pd`, recompute all K/V (with `dkv_pd` all but the prompt's) before
            every n-th step of a block; None is 8 with `dkv` and `dkv_pd`, and only before the first with `dual`, where
            1 equals decoding without a cache.
        horizon: blocks that a sequence has from the one under way on; it grows with each. None: all of the reply's.
        prefix_look, after_look: of `vicinity`, positions before and behind the block that are computed anew with it.
        warmup_steps: of `vicinity`, steps of a request's first block that compute all, before the one that keeps it.
        policy: unmasking policy of requests that name none.
        threshold: `threshold` and `credit` unmask all positions whose confidence reaches it, `dynamic` those above it.
        factor: `factor`'s f, see `unmask.policy`.
        entropy_bound, position_penalty: `entropy_bounded` unmasks positions while the sum of their entropies (nats) is
            below the bound; a window those whose entropy is, with the penalty for each position behind its first
            masked one.
        credit_alpha, credit_beta, credit_gamma: of `credit`, see `unmask.credit`.
        alg_temp: above 0, `static`, `margin` and `entropy` draw positions by their scores divided by it (Dream).
        steps_per_block: denoising steps that a block is spread over, by the policies that have a schedule (LLaDA's
            steps divided by its number of blocks); None is as many as the block has positions. A request gives
            `dllm_steps` for its whole generation.
        cfg_scale: classifier-free guidance by the prompt (`unmask.guidance`) of requests that say nothing of it; None:
            no request may ask for it.
        attention: implementation of attention, see `attention.choose`; `auto` takes the best that works here.
        mode: `self_speculation`: autoregression of what diffusion drafts, in windows of up to `block_length`.
    """

    model_config = STRICT
    takes_files = True

    horizon: _Horizon | None = None
    policy: _Policy = "static"
    threshold: _Threshold = 0.9
    factor: _Positive = 1.0
    entropy_bound: _Positive = 0.35
    position_penalty: _Penalty | None = None
    credit_alpha: _Gain = 0.7
    credit_beta: _Decay = 0.8
    credit_gamma: _Gain = 0.2
    alg_temp: _AlgTemp | None = None
    steps_per_block: Annotated[Count | None, Field(description="null and whole numbers from 1 on")] = None
    cfg_scale: _CfgScale | None = None
    attention: _Attention = "auto"
    mode: Annotated[ServedMode, Field(description="'diffusion' and 'self_speculation'")] = "diffusion"

    @model_validator(mode="after")
    def _guidance_needs_no_cache(self) -> Self:
        if self.cfg_scale is not None and self.refresh_every != 1:
            raise ValueError(
                f"cfg_scale is {self.cfg_scale} but kv_policy is {self.kv_policy!r} with refresh_every "
                f"{self.refresh_every}, which keeps K/V from step to step, and none of the sequence without its prompt"
                "; set refresh_every to 1 (of a bidirectional model) or leave cfg_scale out"
            )
        return self

    @model_validator(mode="after")
    def _sequences_can_grow(self) -> Self:
        if problem := no_growth("horizon", self.horizon, self.kv_policy):
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _steps_fit_block(self) -> Self:
        if self.steps_per_block is None:
            return self
        if self.steps_per_block > self.block_length:
            raise ValueError(
                f"steps_per_block is {self.steps_per_block} but block_length is {self.block_length}, and each step "
                f"unmasks at least one token; choose 1..{self.block_length}"
            )
        if not is_even(self.policy, self.steps_per_block, self.block_length):
            raise ValueError(
                f"steps_per_block is {self.steps_per_block}, but policy 'dynamic' needs one that divides block_length "
                f"{self.block_length}; choose a divisor or another policy"
            )
        return self


class RequestOptions(WithParameters):
    """Unmasking policy of one request, where None means the server's setting, what it shows, and its drafts.

    Attributes:
        steps: denoising steps of the whole generation, of policies that have a schedule.
        stream: `denoising` streams the canvas of each step besides.
        logits_eos_inf: EOS is never taken (LLaDA's flag of the name).
        speculation, budget: false: no drafts; the most drafts that a step evaluates for this request.
        canvas, suffix: the answer with holes, which are filled in; what lies behind the reply.
    """

    model_config = STRICT

    policy: _Policy | None = None
    threshold: _Threshold | None = None
    factor: _Positive | None = None
    entropy_bound: _Positive | None = None
    position_penalty: _Penalty | None = None
    credit_alpha: _Gain | None = None
    credit_beta: _Decay | None = None
    credit_gamma: _Gain | None = None
    alg_temp: _AlgTemp | None = None
    cfg_scale: _CfgScale | None = None
    steps: Count | None = None
    stream: Annotated[Literal["denoising"] | None, Field(description="null and 'denoising'")] = None
    logits_eos_inf: Annotated[Literal[True] | None, Field(description="null and true")] = None
    speculation: Annotated[Literal[False] | None, Field(description="null and false")] = None
    horizon: _Horizon | None = None
    budget: Annotated[int | None, Field(ge=0, le=1024, description="null and whole numbers from 0 to 1024")] = None
    canvas: Annotated[str | list[int | None] | None, _Given] = None
    suffix: Annotated[str | list[int] | None, Field(description="null, texts and lists of token ids")] = None


OWN_OPTIONS = {"steps", "stream", "logits_eos_inf", "speculation", "budget", "canvas", "suffix"}
"""Those that no setting of a server is the default of."""


def request_keys() -> tuple[str, ...]:
    """Return the keys of `extra_args` that are ours."""
    return tuple(REQUEST_PREFIX + name for name in RequestOptions.names())


class InvalidOptionError(ConfigError):
    """A value that is not allowed; `parameter` and `value` are as the user wrote them."""

    def __init__(self, message: str, parameter: str, value: object) -> None:
        super().__init__(message)
        self.parameter = parameter
        self.value = value


def parse_server_settings(
    settings: object, *, prefix: str = "additional_config.dllm.", defaults: Mapping[str, Any] | None = None
) -> DllmConfig:
    """Read the value of `additional_config["dllm"]`.

    Args:
        settings: this value.
        prefix: what messages put before a field's name; `--` where fields are given as options.
        defaults: the model's values of fields that are not given.

    Raises: InvalidOptionError naming the field, what was given, what is allowed and what to do.
    """
    if not isinstance(settings, Mapping):
        raise InvalidOptionError(
            f"additional_config.dllm is {settings!r}, allowed is an object with the fields "
            f"{', '.join(DllmConfig.names())}; pass for example {{'dllm': {{'block_length': 32}}}}",
            "additional_config.dllm",
            settings,
        )
    try:
        return DllmConfig.model_validate({**(defaults or {}), **settings})
    except ValidationError as error:
        raise explain(error, DllmConfig, prefix) from None


def parse_request_options(extra_args: Mapping[str, Any] | None) -> RequestOptions:
    """Read the `dllm_*` keys of a request's `extra_args`; other keys belong to others and are left alone.

    Not so a key that looks like a typo of ours, or like one of ours without the prefix: it would have no effect.

    Raises: InvalidOptionError naming the key, what was given, what is allowed and what to do.
    """
    if extra_args is not None and not (isinstance(extra_args, Mapping) and all(isinstance(k, str) for k in extra_args)):
        raise InvalidOptionError(
            f"extra_args is {reprlib.repr(extra_args)}, allowed are objects with text keys, of ours "
            f"{', '.join(request_keys())}; give an object like {{'dllm_policy': 'static'}}",
            "extra_args",
            extra_args,
        )
    for key, value in (extra_args or {}).items():
        if not key.startswith(REQUEST_PREFIX) and (meant := _meant_key(key)):
            raise InvalidOptionError(
                f"{key} is not known; allowed are {', '.join(request_keys())}; did you mean {meant!r}?", key, value
            )
    values = {
        key.removeprefix(REQUEST_PREFIX): plain_number(value)
        for key, value in (extra_args or {}).items()
        if key.startswith(REQUEST_PREFIX)
    }
    try:
        return RequestOptions.model_validate(values)
    except ValidationError as error:
        raise explain(error, RequestOptions, REQUEST_PREFIX) from None


def _meant_key(key: str) -> str | None:
    is_bare = key in RequestOptions.names()
    return REQUEST_PREFIX + key if is_bare else nearest(key, request_keys(), STRICT_LIKENESS)


def plain_number(value: object) -> object:
    """Return a number of another library (NumPy's, say) as Python's own, anything else as it is."""
    if isinstance(value, Integral):
        return value if isinstance(value, int) else int(value)
    return float(value) if isinstance(value, Real) else value


def explain(error: ValidationError, model: type[BaseModel], prefix: str) -> InvalidOptionError:
    """Turn the first finding of the schema library into our three-part message."""
    finding = error.errors()[0]
    if finding["type"] == "parameter":
        name, value, allowed = (finding["ctx"][key] for key in ("name", "value", "allowed"))
        name = prefix + (name.replace("_", "-") if prefix == "--" else name)
        return InvalidOptionError(f"{name} is {value!r:.80}, allowed are {allowed}; give one of these", name, value)
    if not finding["loc"]:  # a rule between fields, whose text is already ours
        message = finding["msg"].removeprefix("Value error, ")
        if prefix == "--":  # fields are named as the options that they are
            options = r"\b(" + "|".join(_names(model)) + r")\b"
            message = re.sub(options, lambda found: prefix + found[0].replace("_", "-"), message)
        where = prefix.rstrip(".-")
        return InvalidOptionError(f"{where}: {message}" if where else message, where, finding["input"])
    field = str(finding["loc"][0])
    name, value = prefix + field, finding["input"]
    if prefix == "--":
        name = name.replace("_", "-")
    if finding["type"] in ("extra_forbidden", "invalid_key"):  # the latter is no text
        names = [prefix + known for known in _names(model)]
        meant = nearest(field, _names(model))
        todo = f"did you mean {prefix + meant!r}?" if meant else "remove or rename it"
        return InvalidOptionError(f"{name} is not known; allowed are {', '.join(names)}; {todo}", name, value)
    allowed = allowed_policies() if field == "policy" else _allowed(model.model_fields[field])
    todo = did_you_mean(value, re.findall(r"'(\w+)'", allowed), "give one of these")
    return InvalidOptionError(f"{name} is {reprlib.repr(value)}, allowed are {allowed}; {todo}", name, value)


def _names(model: type[BaseModel]) -> tuple[str, ...]:
    return model.names() if issubclass(model, WithParameters) else tuple(model.model_fields)


def _allowed(field: FieldInfo) -> str:
    """Return a field's description, or that of the type it wraps."""
    metadata = (each for option in get_args(field.annotation) for each in getattr(option, "__metadata__", ()))
    described = (each.description for each in metadata if isinstance(each, FieldInfo) and each.description)
    found = field.description or next(described, None)
    assert found, "every type above is described"
    return str(found)


def no_growth(name: str, horizon: int | None, kv_policy: KvPolicyName) -> str | None:
    """Tell why sequences do not grow under a KV policy by an option `name`; None: they do, or are not to."""
    if horizon is None or kv_policy in ("dual", "prefix"):
        return None
    return (
        f"{name} is {horizon}, but kv_policy is {kv_policy!r}, and sequences grow with 'dual' and 'prefix' alone "
        "(where blocks see nothing behind them, they do by themselves); allowed is null; remove it"
    )


def is_even(policy: str, steps_per_block: int, block_length: int) -> bool:
    """Tell whether a policy's steps follow from its canvases.

    Under `dynamic` a block may have any number of masked positions before a step. So it has to be known without the
    step's index how many the step unmasks at least, as it is where all steps have the same number.
    """
    return policy != "dynamic" or block_length % steps_per_block == 0
