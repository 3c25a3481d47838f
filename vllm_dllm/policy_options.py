"""Which options each policy takes, and the parameters of those without a native twin, which declare their own.

Part of `config`, which has all other options. No torch here, unless such a policy is asked for.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import (
    BaseModel,
    ModelWrapValidatorHandler,
    PrivateAttr,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from vllm_dllm.names import PolicyName
from vllm_dllm.unmask.parameter import Parameter
from vllm_dllm.unmask.registry import (
    NATIVE,
    file_option,
    file_options,
    needs_file,
    parameters,
    parameters_of,
    torch_policies,
    torch_policy,
)

POLICY_ALIASES: dict[str, PolicyName] = {
    "low_confidence": "static",  # LLaDA's name
    "low_confidence_static": "static",  # SDAR's
    "maskgit_plus": "static",  # Dream's
    "topk_margin": "margin",
    "low_confidence_dynamic": "dynamic",
}
"""The families' own names of policies; taken wherever the name of one is, and replaced by ours."""

POLICY_OPTIONS: dict[str, tuple[str, ...]] = {
    "static": ("steps", "alg_temp"),
    "random": ("steps",),
    "threshold": ("threshold",),
    "factor": ("factor",),
    "margin": ("steps", "alg_temp"),
    "entropy": ("steps", "alg_temp"),
    "origin": ("steps",),
    "sequential": ("steps",),
    "dynamic": ("threshold", "steps"),
    "entropy_bounded": ("entropy_bound",),
    "credit": ("threshold", "credit_alpha", "credit_beta", "credit_gamma"),
}
"""The options each policy with a native twin takes."""


def policy_names() -> tuple[str, ...]:
    """Return the names of all policies, with those that are aliases."""
    return (*NATIVE, *torch_policies(), *POLICY_ALIASES)


def known_policy(name: object) -> str:
    """Return a policy's name without alias. Raises: PydanticCustomError of type `policy`."""
    if not (isinstance(name, str) and name in policy_names()):
        raise PydanticCustomError("policy", "no policy", {})
    return POLICY_ALIASES.get(name, name)


def allowed_policies() -> str:
    """Return what a policy's name may be, for messages."""
    return ", ".join(map(repr, policy_names()))


def options_of(policy: str) -> tuple[str, ...]:
    """Return the options a policy takes; a request that gives another one is refused, since it would do nothing."""
    if policy in POLICY_OPTIONS:
        return POLICY_OPTIONS[policy]
    return (*torch_policy(policy).takes, *parameters_of(policy))


def policy_settings(policy: str) -> tuple[str, ...]:
    """Return the fields of `DllmConfig` that a policy reads."""
    return tuple("steps_per_block" if option == "steps" else option for option in options_of(policy))


class WithParameters(BaseModel):
    """Settings or options that, besides their fields, have the parameters of policies without a native twin."""

    takes_files: ClassVar[bool] = False  # of nets that policies look at

    _parameters: dict[str, float] = PrivateAttr(default_factory=dict)
    _files: dict[str, str] = PrivateAttr(default_factory=dict)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Return the names of all fields, parameters and files."""
        return (*cls.model_fields, *parameters(), *(file_options() if cls.takes_files else ()))

    @property
    def files(self) -> Mapping[str, str]:
        """Paths of the nets' files, by option."""
        return self._files

    @property
    def parameters(self) -> Mapping[str, float]:
        """Those that were given."""
        return self._parameters

    @model_validator(mode="wrap")
    @classmethod
    def _take_parameters(cls, values: object, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(values, Mapping):
            return handler(values)
        others = {name for name in values if isinstance(name, str) and name not in cls.model_fields}
        known = parameters() if others else {}
        found = {name: _checked(name, values[name], known[name]) for name in sorted(others & known.keys())}
        files = others & file_options().keys() if others and cls.takes_files else set()
        paths = {name: _checked_path(name, values[name]) for name in sorted(files)}
        made = handler({name: value for name, value in values.items() if name not in {*found, *paths}})
        made._parameters.update(found)
        made._files.update(paths)
        policy = getattr(made, "policy", None)
        if cls.takes_files and needs_file(str(policy)) and file_option(str(policy)) not in paths:
            raise ValueError(f"policy is {policy!r}, which looks at a net; give its file as {file_option(str(policy))}")
        return made

    @model_serializer(mode="wrap")
    def _with_parameters(self, handler: SerializerFunctionWrapHandler, info: SerializationInfo) -> dict[str, Any]:
        own: dict[str, Any] = {**self._parameters, **self._files}
        shown = {name: its for name, its in own.items() if info.include is None or name in info.include}
        return {**handler(self), **shown}


def _checked(name: str, value: object, parameter: Parameter) -> float:
    try:
        return parameter.check(value)
    except ValueError:
        context = {"name": name, "value": value, "allowed": parameter.allowed}
        raise PydanticCustomError("parameter", "not allowed", context) from None


def _checked_path(name: str, value: object) -> str:
    if isinstance(value, str) and value:
        return value
    context = {"name": name, "value": value, "allowed": "paths of safetensors files"}
    raise PydanticCustomError("parameter", "not allowed", context)


def own_values(policy: str, *given: Mapping[str, float]) -> tuple[float, ...]:
    """Return the parameters of a policy without a native twin, in their order.

    Args:
        policy: its name.
        given: parameters by option; the first that has one counts, and behind all the published default.
    """
    return tuple(
        next((each[option] for each in given if option in each), its.default)
        for option, its in parameters_of(policy).items()
    )
