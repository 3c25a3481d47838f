"""Settings of a server and options of a request: THE place where both are checked.

A server reads `additional_config={"dllm": {...}}` (`--additional-config '{"dllm": {...}}'`); a request may override
the unmasking policy through `SamplingParams.extra_args` (`vllm_xargs` over HTTP) with the keys `dllm_policy`,
`dllm_threshold`, `dllm_factor` and `dllm_steps`. Nothing here imports vLLM or torch.
"""

import reprlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from vllm_dllm.errors import ConfigError

PolicyName = Literal["static", "random", "threshold", "factor"]
KvPolicyName = Literal["dual", "prefix"]
AttentionName = Literal["auto", "csrc", "flashinfer", "xformers", "torch"]

REQUEST_PREFIX = "dllm_"

# Strict, so that "0.9" or true is refused where a number is meant; a JSON integer is still a valid float.
STRICT = ConfigDict(extra="forbid", frozen=True, strict=True)

# Each type's description says what is allowed, in error messages.
_Policy = Annotated[PolicyName, Field(description="'static', 'random', 'threshold' and 'factor'")]
_Threshold = Annotated[float, Field(gt=0.0, le=1.0, description="numbers above 0 and up to 1")]
_Factor = Annotated[float, Field(gt=0.0, allow_inf_nan=False, description="finite numbers above 0")]
_Count = Annotated[int, Field(ge=1, description="whole numbers from 1 on")]


class DllmConfig(BaseModel):
    """Settings of a server.

    Attributes:
        block_length: positions denoised together (tokens).
        kv_policy: `dual` freezes the K/V of everything but the block, `prefix` of what precedes it
            (Fast-dLLM, arXiv:2505.22618).
        refresh_every: with `dual`, recompute all K/V before every n-th step of a block; None only before the first,
            1 before each, which equals decoding without a cache.
        policy: unmasking policy of requests that name none.
        threshold: `threshold` unmasks every position whose confidence reaches it.
        factor: `factor`'s f, see `unmask.policy`.
        steps_per_block: denoising steps that `static` and `random` spread a block over (LLaDA's steps divided by its
            number of blocks); None is one token per step. A request gives `dllm_steps` for its whole generation.
        attention: implementation of attention, see `attention.choose`; `auto` takes the best that works here.
    """

    model_config = STRICT

    block_length: Annotated[int, Field(ge=1, le=1024, description="whole numbers from 1 to 1024")] = 32
    kv_policy: Annotated[KvPolicyName, Field(description="'dual' and 'prefix'")] = "dual"
    refresh_every: Annotated[_Count | None, Field(description="null and whole numbers from 1 on")] = None
    policy: _Policy = "static"
    threshold: _Threshold = 0.9
    factor: _Factor = 1.0
    steps_per_block: Annotated[_Count | None, Field(description="null and whole numbers from 1 on")] = None
    attention: Annotated[AttentionName, Field(description="'auto', 'csrc', 'flashinfer', 'xformers' and 'torch'")] = (
        "auto"
    )

    @model_validator(mode="after")
    def _steps_fit_block(self) -> Self:
        if self.steps_per_block is not None and self.steps_per_block > self.block_length:
            raise ValueError(
                f"steps_per_block is {self.steps_per_block} but block_length is {self.block_length}, and each step "
                f"unmasks at least one token; choose 1..{self.block_length}"
            )
        return self

    @model_validator(mode="after")
    def _refresh_needs_dual(self) -> Self:
        if self.refresh_every is not None and self.kv_policy != "dual":
            raise ValueError(
                f"refresh_every is {self.refresh_every} but kv_policy is {self.kv_policy!r}, which recomputes what "
                "follows the block at every step; leave refresh_every out or set kv_policy to 'dual'"
            )
        if self.refresh_every is not None and self.refresh_every > self.block_length:
            raise ValueError(
                f"refresh_every is {self.refresh_every} but a block of {self.block_length} has at most as many steps; "
                f"choose 1..{self.block_length} or leave it out"
            )
        return self


class RequestOptions(BaseModel):
    """Unmasking policy of one request; None means the server's setting."""

    model_config = STRICT

    policy: _Policy | None = None
    threshold: _Threshold | None = None
    factor: _Factor | None = None
    steps: _Count | None = None


POLICY_OPTIONS: dict[PolicyName, tuple[str, ...]] = {
    "static": ("steps",),
    "random": ("steps",),
    "threshold": ("threshold",),
    "factor": ("factor",),
}
"""The options each policy takes; a request that gives another one is refused, since it would have no effect."""

REQUEST_KEYS = tuple(REQUEST_PREFIX + name for name in RequestOptions.model_fields)


class InvalidOptionError(ConfigError):
    """A value that is not allowed; `parameter` and `value` are as the user wrote them."""

    def __init__(self, message: str, parameter: str, value: object) -> None:
        super().__init__(message)
        self.parameter = parameter
        self.value = value


def parse_server_settings(settings: object, *, prefix: str = "additional_config.dllm.") -> DllmConfig:
    """Read the value of `additional_config["dllm"]`.

    Args:
        settings: this value.
        prefix: what messages put before a field's name; `--` where fields are given as options.

    Raises: InvalidOptionError naming the field, what was given, what is allowed and what to do.
    """
    if not isinstance(settings, Mapping):
        raise InvalidOptionError(
            f"additional_config.dllm is {settings!r}, allowed is an object with the fields "
            f"{', '.join(DllmConfig.model_fields)}; pass for example {{'dllm': {{'block_length': 32}}}}",
            "additional_config.dllm",
            settings,
        )
    try:
        return DllmConfig.model_validate(dict(settings))
    except ValidationError as error:
        raise explain(error, DllmConfig, prefix) from None


def parse_request_options(extra_args: Mapping[str, Any] | None) -> RequestOptions:
    """Read the `dllm_*` keys of a request's `extra_args`; other keys belong to others and are left alone.

    Raises: InvalidOptionError naming the key, what was given, what is allowed and what to do.
    """
    if extra_args is not None and not (isinstance(extra_args, Mapping) and all(isinstance(k, str) for k in extra_args)):
        raise InvalidOptionError(
            f"extra_args is {reprlib.repr(extra_args)}, allowed are objects with text keys, of ours "
            f"{', '.join(REQUEST_KEYS)}; give one of these",
            "extra_args",
            extra_args,
        )
    values = {
        key.removeprefix(REQUEST_PREFIX): value
        for key, value in (extra_args or {}).items()
        if key.startswith(REQUEST_PREFIX)
    }
    try:
        return RequestOptions.model_validate(values)
    except ValidationError as error:
        raise explain(error, RequestOptions, REQUEST_PREFIX) from None


def check_policy_options(options: RequestOptions, settings: DllmConfig) -> None:
    """Check that a request gives no option that its policy ignores.

    Raises: InvalidOptionError.
    """
    policy = options.policy or settings.policy
    given = options.model_dump(exclude={"policy"}, exclude_none=True)
    for name, value in given.items():
        if name not in POLICY_OPTIONS[policy]:
            allowed = ", ".join(REQUEST_PREFIX + option for option in POLICY_OPTIONS[policy])
            raise InvalidOptionError(
                f"{REQUEST_PREFIX}{name} is {value!r}, but the request's policy {policy!r} does not use it; allowed is "
                f"{allowed}; remove it or choose another {REQUEST_PREFIX}policy",
                REQUEST_PREFIX + name,
                value,
            )


def explain(error: ValidationError, model: type[BaseModel], prefix: str) -> InvalidOptionError:
    """Turn the first finding of the schema library into our three-part message."""
    finding = error.errors()[0]
    if not finding["loc"]:  # a rule between fields, whose text is already ours
        message = finding["msg"].removeprefix("Value error, ")
        where = prefix.rstrip(".-")
        return InvalidOptionError(f"{where}: {message}" if where else message, where, finding["input"])
    field = str(finding["loc"][0])
    name, value = prefix + field, finding["input"]
    if prefix == "--":
        name = name.replace("_", "-")
    if finding["type"] == "extra_forbidden":
        allowed = ", ".join(prefix + known for known in model.model_fields)
        return InvalidOptionError(f"{name} is not known; allowed are {allowed}; remove or rename it", name, value)
    allowed = _allowed(model.model_fields[field])
    return InvalidOptionError(f"{name} is {reprlib.repr(value)}, allowed are {allowed}; give one of these", name, value)


def _allowed(field: FieldInfo) -> str:
    """Return a field's description, or that of the type it wraps."""
    found = field.description or next(
        metadata.description
        for option in get_args(field.annotation)
        for metadata in getattr(option, "__metadata__", ())
        if metadata.description
    )
    assert found, "every type above is described"
    return str(found)


def generation_length(prompt_len: int, max_tokens: int, block_length: int, max_model_len: int) -> int:
    """Return how many positions a request generates: whole blocks for `max_tokens` that fit `max_model_len`.

    LLaDA attends to every masked position of the generation, so this length is part of what the model sees. It is 0
    for a prompt that leaves less than one block.
    """
    wanted = -(-max_tokens // block_length) * block_length
    room = (max_model_len - prompt_len) // block_length * block_length
    return max(min(wanted, room), 0)


def split_steps(steps: int, gen_length: int, block_length: int) -> int:
    """Split the steps of a generation over its blocks, as LLaDA's `generate` does.

    Args:
        steps: denoising steps of the whole generation.
        gen_length: positions generated, a multiple of `block_length`.
        block_length: positions per block.

    Returns: steps of each block, 1..block_length.

    Raises: ValueError when `steps` is not a whole number of steps, at most `block_length`, for each block.
    """
    num_blocks = gen_length // block_length
    if steps % num_blocks or steps > gen_length:
        raise ValueError(
            f"steps is {steps}, but {gen_length} positions in {num_blocks} blocks of {block_length} need a multiple of "
            f"{num_blocks} between {num_blocks} and {gen_length}; change steps or max_tokens"
        )
    return steps // num_blocks
