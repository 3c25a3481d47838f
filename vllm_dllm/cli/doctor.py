"""`vllm-dllm doctor`: what of this installation works, and the command that mends what does not."""

import ctypes
import importlib.metadata
import mmap
import os
import platform
from collections.abc import Collection, Iterator, Sequence
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from vllm_dllm import __version__
from vllm_dllm.cli.console import waiting_for
from vllm_dllm.cli.finding import Finding, Level
from vllm_dllm.cli.neighbours import model_runner, neighbours
from vllm_dllm.errors import KernelUnavailable, UnsupportedVllmError

STYLES: dict[Level, str] = {"ok": "green", "missing": "yellow", "broken": "red"}

INSTALL_VLLM = "`pip install 'vllm>=0.32,<0.34'`"

LIBNUMA = "libnuma.so.1"

LIBRARIES = {"flashinfer": "flashinfer-python", "xformers": "xformers", "flash_attn": "flash-attn"}
"""Optional ones, by module, and how pip calls them."""


def doctor(
    self_test: Annotated[
        bool, typer.Option("--self-test", help="Compare every kernel with plain torch on this device, too.")
    ] = False,
) -> None:
    """Show what is installed, which kernels are loaded and which attention serves, and how to mend what is missing.

    The exit status is 1 when no model can be served here, and where a kernel is wrong.
    """
    console, findings = Console(), []
    for finding in chain(examine(), compare() if self_test else ()):
        findings.append(finding)
        line = Text.assemble((f"{finding.level:8}", STYLES[finding.level]), f"{finding.topic:22}", finding.text)
        console.print(line, soft_wrap=True)
    if any(finding.level == "broken" for finding in findings):
        raise typer.Exit(1)


def examine() -> Iterator[Finding]:
    """Look at everything."""
    yield Finding("vllm-dllm", f"{__version__}, Python {platform.python_version()}")
    yield (found_vllm := vllm())
    yield from system_libraries()
    yield plugin()
    if find_spec("torch") is None:
        yield Finding("torch", f"is not installed; vLLM brings it: {INSTALL_VLLM}", "broken")
        return
    with waiting_for("importing torch"):
        found = torch_build()
    yield found
    with waiting_for("looking for GPUs and loading the native ops"):
        devices = [*gpus(), *kernels()]
    yield from devices
    with waiting_for("trying the implementations of attention"):
        implementations = list(attention())
    yield from implementations
    yield from libraries()
    yield model_runner()
    if found_vllm.level == "ok":
        yield from neighbours()


def vllm() -> Finding:
    """Look for a vLLM that the plugin was written for."""
    from vllm_dllm.plugin import check_vllm_version

    try:
        check_vllm_version()
    except importlib.metadata.PackageNotFoundError:
        return Finding("vLLM", f"is not installed; install it: {INSTALL_VLLM}", "broken")
    except UnsupportedVllmError as error:
        return Finding("vLLM", f"{error}: {INSTALL_VLLM}", "broken")
    return Finding("vLLM", importlib.metadata.version("vllm"))


def system_libraries() -> Iterator[Finding]:
    """Look for what vLLM's kernels for CPUs load and pip does not install.

    Without it vLLM's server starts, warns, and ends half a minute later with an operator that is not there.
    """
    spec = find_spec("vllm")
    folders = (spec and spec.submodule_search_locations) or ()
    files = [file for folder in folders for file in Path(folder).glob("_C*.so") if file.stat().st_size]
    if not any(_contains(file, LIBNUMA.encode() + b"\0") for file in files):
        return
    try:
        ctypes.CDLL(LIBNUMA)
    except OSError as error:
        yield Finding(
            "libnuma",
            f"vLLM's kernels for CPUs do not load without it ({error}); install it: `apt install libnuma1`, on Fedora "
            "`dnf install numactl-libs`",
            "broken",
        )


def _contains(path: Path, text: bytes) -> bool:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(text) >= 0


def plugin() -> Finding:
    """Look whether vLLM will load the plugin."""
    names = [entry.name for entry in importlib.metadata.entry_points(group="vllm.general_plugins")]
    if "dllm" not in names:
        return Finding(
            "plugin",
            "vLLM will not load it: vllm-dllm is imported from a folder, not installed; install it: "
            "`pip install vllm-dllm`, in a checkout `make setup`",
            "broken",
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "dllm" not in allowed.split(","):
        return Finding(
            "plugin",
            f"VLLM_PLUGINS is {allowed!r}, which leaves it out; vLLM loads what is named there: "
            f"`export VLLM_PLUGINS={','.join(filter(None, [allowed, 'dllm']))}`, or `unset VLLM_PLUGINS`",
            "broken",
        )
    from vllm_dllm.models.interface import FAMILY_BY_ARCHITECTURE

    return Finding("plugin", f"vLLM loads it at start, with {', '.join(FAMILY_BY_ARCHITECTURE)}")


def torch_build() -> Finding:
    """Say which torch is installed."""
    import torch

    return Finding("torch", f"{torch.__version__}, {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'no CUDA'}")


def gpus() -> Iterator[Finding]:
    """Look for GPUs."""
    import torch

    if not torch.cuda.is_available():
        yield Finding("GPU", "none that torch sees; models are served on the CPU")
    for number in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(number)
        yield Finding("GPU", f"{number}: {torch.cuda.get_device_name(number)}, compute capability {major}.{minor}")


def kernels() -> Iterator[Finding]:
    """Look at the library of native ops."""
    import torch

    from vllm_dllm.ops import library, load

    try:
        load.load_once()
        isa = library.cpu_isa()
    except (KernelUnavailable, RuntimeError) as error:
        yield Finding("native ops", f"{error}", "missing")
        return
    yield Finding("native ops", f"{', '.join(load.OPS)}, from {load.LIBRARY}")
    yield cpu_kernels(isa, library.machine_isa(), library.built_isas())
    capabilities = {torch.cuda.get_device_capability(number) for number in range(torch.cuda.device_count())}
    yield from cuda_kernels(library.cuda_archs(), capabilities)


def cpu_kernels(isa: str, best: str, built: Sequence[str]) -> Finding:
    """Compare the instruction sets of the build with the machine's best one.

    Args:
        isa: what the kernels run with.
        best: of the machine.
        built: what the library was built for.
    """
    if best in built:
        return Finding("CPU kernels", f"run with {isa}, built for {', '.join(built)}; VLLM_DLLM_ISA chooses")
    return Finding(
        "CPU kernels",
        f"run with {isa}, as the library was built for {', '.join(built)} and not for {best}, which this machine has; "
        "build it here, or with `CMAKE_ARGS=-DDLLM_ISAS=all`",
        "missing",
    )


def cuda_kernels(archs: Sequence[str], capabilities: Collection[tuple[int, int]]) -> Iterator[Finding]:
    """Compare what the CUDA kernels are compiled for with the GPUs at hand.

    Args:
        archs: as CMAKE_CUDA_ARCHITECTURES has them.
        capabilities: of the GPUs.
    """
    from vllm_dllm.ops.load import BUILD_COMMAND

    if not archs:
        if capabilities:
            text = f"not built, as torch had no CUDA then; with such a torch and nvcc build them: {BUILD_COMMAND}"
            yield Finding("CUDA kernels", text, "missing")
        return
    unfit = sorted(capability for capability in capabilities if not any(runs_on(arch, capability) for arch in archs))
    for major, minor in unfit:
        yield Finding(
            "CUDA kernels",
            f"compiled for {', '.join(archs)}, not for compute capability {major}.{minor}; rebuild them: "
            f"CMAKE_ARGS=-DCMAKE_CUDA_ARCHITECTURES={major}{minor} {BUILD_COMMAND}",
            "missing",
        )
    if not unfit:
        yield Finding("CUDA kernels", f"compiled for {', '.join(archs)}")


def runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """Tell whether code for an architecture of CMake's runs on a GPU, compiled further by the driver if need be."""
    name, _, kind = arch.partition("-")
    number, suffix = name.rstrip("af"), name[-1]
    major, minor = divmod(int(number), 10)
    if suffix == "a":  # of this very architecture
        return (major, minor) == capability
    if suffix == "f" or kind == "real":  # machine code serves later GPUs of its generation
        return major == capability[0] and minor <= capability[1]
    return (major, minor) <= capability


def attention() -> Iterator[Finding]:
    """Look at each implementation of attention, and which one `auto` takes for a usual model."""
    import torch

    from vllm_dllm.attention.choose import IMPLEMENTATIONS, choose_attention
    from vllm_dllm.attention.interface import Setting

    has_gpu = torch.cuda.is_available()
    device, capability = ("cuda", torch.cuda.get_device_capability()) if has_gpu else ("cpu", None)
    setting = Setting(device, capability, torch.bfloat16, torch.bfloat16, head_dim=128, page_size=None)
    for name, implementation in IMPLEMENTATIONS.items():
        refusal = implementation.support.refusal(setting)
        if refusal is None:
            refusal = implementation.unavailable(setting)
            yield Finding(f"attention {name}", refusal or f"works on {device}", "missing" if refusal else "ok")
    try:
        choice = choose_attention("auto", setting)
    except KernelUnavailable as error:
        yield Finding("attention", str(error), "broken")
    else:
        yield Finding("attention", f"auto takes {choice.label} for bfloat16 and heads of 128")


def compare() -> Iterator[Finding]:
    """Compare native ops and each implementation of attention that works here with plain torch, at usual shapes."""
    from vllm_dllm.self_test.isolated import run_isolated, usual_requests

    for request in usual_requests():
        with waiting_for(f"comparing {'native ops' if request.attention is None else request.attention[0]}"):
            checks = run_isolated(request)
        for check in checks:
            text = f"{check.case}: error {check.error:.2g}, allowed {check.allowed:.2g}"
            yield Finding(check.kernel, text, "ok" if check.agrees else "broken")


def libraries() -> Iterator[Finding]:
    """Look for optional libraries."""
    for module, name in LIBRARIES.items():
        if find_spec(module) is not None:
            yield Finding(name, importlib.metadata.version(name))
