"""What other plugins of the same vLLM change that our models need; `vllm-dllm doctor` has a process of its own do it.

vLLM loads every plugin into each of its processes. One that forces another model runner, worker or platform, or that
registers an architecture of ours behind us, keeps our models from being served, and nothing else says which it was.
"""

import importlib.metadata
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from vllm_dllm.models.interface import FAMILIES

VARIABLE = "VLLM_USE_V2_MODEL_RUNNER"
MARK = "neighbour: "
GENERAL, PLATFORMS = "vllm.general_plugins", "vllm.platform_plugins"


@dataclass(frozen=True, slots=True)
class Neighbour:
    """Another plugin that is loaded beside ours.

    Attributes:
        name: of its entry point, as `VLLM_PLUGINS` has it.
        distribution: name and version of the package that brings it.
        changes: what it changes that our models need; none where it is harmless.
        error: why it does not load, though vLLM goes on; None where it does.
    """

    name: str
    distribution: str
    changes: tuple[str, ...]
    error: str | None


def others(group: str) -> list[importlib.metadata.EntryPoint]:
    """Return the plugins of a group that vLLM would load, without ours and vLLM's own."""
    allowed = os.environ.get("VLLM_PLUGINS")
    found = importlib.metadata.entry_points(group=group)
    return [
        entry
        for entry in found
        if not entry.value.startswith(("vllm.", "vllm_dllm.")) and (allowed is None or entry.name in allowed.split(","))
    ]


def state() -> dict[str, str]:
    """Return what our models need of vLLM, as it is now, by what a user calls it."""
    from vllm.config import ParallelConfig, VllmConfig
    from vllm.model_executor.models import ModelRegistry
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    chooser = VllmConfig.use_v2_model_runner.fget
    models = {
        f"the model of {family.architecture}": str(ModelRegistry.models.get(family.architecture)) for family in FAMILIES
    }
    return {
        VARIABLE: os.environ.get(VARIABLE, "unset"),
        "which model runner is chosen": f"{chooser.__module__}.{chooser.__qualname__}",
        "the V2 model runner": f"{GPUModelRunner.__module__}.{GPUModelRunner.__qualname__}",
        "the default worker": ParallelConfig.__dataclass_fields__["worker_cls"].default,
        **models,
    }


def examine() -> Iterator[Neighbour]:
    """Load every other plugin behind ours, one after another, as vLLM does, and see what each changes."""
    yield from map(_platform, others(PLATFORMS))
    from vllm_dllm.plugin import register

    register()
    before = state()
    for entry in others(GENERAL):
        _, error = _load(entry)
        after = state()
        changes = (f"{what} from {before[what]} to {after[what]}" for what in after if after[what] != before[what])
        yield _neighbour(entry, tuple(changes), error)
        before = after


def _platform(entry: importlib.metadata.EntryPoint) -> Neighbour:
    """Ask a platform plugin, as vLLM does, whether it takes the machine: its workers have runners of their own."""
    taken, error = _load(entry)
    changes = (f"the platform to {taken}, which has workers and model runners of its own",) if taken else ()
    return _neighbour(entry, changes, error)


def _load(entry: importlib.metadata.EntryPoint) -> tuple[object, str | None]:
    """Load and call a plugin; returns what it returned, and the error that vLLM would log before it goes on."""
    try:
        return entry.load()(), None
    except Exception as error:  # noqa: BLE001 - as vLLM
        return None, f"{type(error).__name__}: {error}"


def _neighbour(entry: importlib.metadata.EntryPoint, changes: tuple[str, ...], error: str | None) -> Neighbour:
    brings = entry.dist
    where = f"{brings.name} {brings.version}" if brings else "a package without a name"
    return Neighbour(entry.name, where, changes, error)


if __name__ == "__main__":  # whatever plugins print stands between these lines
    for each in examine():
        sys.stdout.write(f"\n{MARK}{json.dumps(asdict(each))}\n")
        sys.stdout.flush()
