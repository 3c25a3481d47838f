"""Which policies there are: those with a native twin, those in torch that come with us, and those of users.

A package of a user offers a policy as an entry point of the group `vllm_dllm.policies`, under the policy's name. No
torch here: a policy is imported when it, or an option that only a policy knows, is first asked for, and those of users
where a server starts.
"""

import functools
from importlib.metadata import EntryPoint, entry_points
from pkgutil import resolve_name
from typing import TYPE_CHECKING, get_args

from vllm_dllm.errors import ConfigError
from vllm_dllm.names import PolicyName
from vllm_dllm.unmask.parameter import Parameter

if TYPE_CHECKING:
    from vllm_dllm.unmask.torch_policy import TorchPolicy

GROUP = "vllm_dllm.policies"

BUILT_IN = {
    "local_leap": "local_leap:LOCAL_LEAP",
    "entropy_threshold": "entropy_threshold:ENTROPY_THRESHOLD",
    "hierarchy": "hierarchy:HIERARCHY",
    "eoser": "eos_rejection:EOSER",
    "ass": "eos_rejection:ASS",
    "eoser_ass": "eos_rejection:EOSER_ASS",
    "confidence_eos_eot_inf": "eos_last:EOS_LAST",
    "learn2pd": "learned:LEARN2PD",
    "eotp": "end_of_text:EOTP",
    "learn2pd_eotp": "end_of_text:LEARN2PD_EOTP",
    "dit_confidence": "dit_confidence:DIT_CONFIDENCE",
    "saber": "saber:SABER",
    "rcr": "remasking:RCR",
    "remdm": "remasking:REMDM",
    "ccd": "coherent:CCD",
    "prophet": "early_commit:PROPHET",
    "adablock": "windows:ADABLOCK",
    "deferred": "windows:DEFERRED",
    "editing": "editing:EDITING",
    "indel": "indel:INDEL",
}
"""Policies in torch code that come with us -> where each is in `unmask.policies`."""

NATIVE: tuple[str, ...] = get_args(PolicyName)
"""Policies of the op `decide_walk`, in the order of its numbers."""


@functools.cache
def user_policies() -> dict[str, EntryPoint]:
    """Return the policies of installed packages. Raises: ConfigError for a name that is taken or no name."""
    found: dict[str, EntryPoint] = {}
    for point in sorted(entry_points(group=GROUP), key=lambda each: each.name):
        where = f"entry point {point.name!r} of group {GROUP} ({_package(point)})"
        if point.name in (*NATIVE, *BUILT_IN, *found):
            raise ConfigError(
                f"{where} has the name of another policy; allowed are other names; rename or uninstall it"
            )
        if not (point.name.isidentifier() and point.name.islower()):
            raise ConfigError(f"{where} has no name of a policy; allowed are words like 'my_policy'; rename it")
        found[point.name] = point
    return found


def torch_policies() -> tuple[str, ...]:
    """Return the names of the policies without a native twin, those that come with us first."""
    return (*BUILT_IN, *user_policies())


def is_users(name: str) -> bool:
    """Tell whether a policy is a user's."""
    return name in user_policies()


@functools.cache
def torch_policy(name: str) -> "TorchPolicy":
    """Return a policy without a native twin. Raises: ConfigError for one of a user that cannot be imported."""
    from vllm_dllm.unmask.torch_policy import TorchPolicy

    if name in BUILT_IN:
        built_in: TorchPolicy = resolve_name(f"vllm_dllm.unmask.policies.{BUILT_IN[name]}")
        return built_in
    point = user_policies()[name]
    where = f"entry point {name!r} of group {GROUP} ({_package(point)})"
    try:
        loaded = point.load()
    except Exception as error:
        raise ConfigError(
            f"{where} cannot be loaded ({type(error).__name__}: {error}); allowed is one that names a TorchPolicy; "
            "mend or uninstall it"
        ) from error
    if not isinstance(loaded, TorchPolicy):
        raise ConfigError(f"{where} is a {type(loaded).__name__}, allowed is a TorchPolicy; mend or uninstall it")
    return loaded


def load_user_policies() -> None:
    """Import all policies of users, any of which a request may name. Raises: ConfigError for one that cannot be."""
    for name in user_policies():
        torch_policy(name)


def changes_tokens(name: str) -> bool:
    """Tell whether a policy may change known tokens, or mask them again: a block does not just grow."""
    return name not in NATIVE and torch_policy(name).tokens_change


def needs_file(name: str) -> bool:
    """Tell whether a policy looks at a net, whose file a server's settings have to give."""
    return name not in NATIVE and torch_policy(name).weights is not None


def file_option(name: str) -> str:
    """Return the setting with the file of a policy's net."""
    return f"{torch_policy(name).file_of or name}_file"


@functools.cache
def file_options() -> dict[str, list[str]]:
    """Return the settings with files of nets -> the policies; imports all without a native twin."""
    found: dict[str, list[str]] = {}
    for name in filter(needs_file, torch_policies()):
        found.setdefault(file_option(name), []).append(name)
    return found


@functools.cache
def parameters() -> dict[str, Parameter]:
    """Return the options of all policies without a native twin; imports them all."""
    return {option: its for name in torch_policies() for option, its in parameters_of(name).items()}


def parameters_of(name: str) -> dict[str, Parameter]:
    """Return the options that a policy without a native twin has for itself."""
    return {f"{name}_{parameter}": its for parameter, its in torch_policy(name).parameters.items()}


def _package(point: EntryPoint) -> str:
    return f"package {point.dist.name}" if point.dist is not None else point.value
