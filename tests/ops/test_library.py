"""What the library says of itself."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vllm_dllm.ops import library

ROOT = Path(__file__).parents[2]
ISAS = ("portable", "avx2", "avx512", "avx512_bf16")


def isa_under(wanted: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from vllm_dllm.ops.library import cpu_isa; print(cpu_isa())"]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | {"VLLM_DLLM_ISA": wanted}, capture_output=True, text=True, check=False
    )


@pytest.mark.slow("kernels")
def test_an_instruction_set_can_be_chosen():
    assert isa_under("portable").stdout == "portable\n"


@pytest.mark.slow("kernels")
def test_an_unknown_instruction_set_is_refused():
    done = isa_under("mmx")
    assert done.returncode == 1
    assert "VLLM_DLLM_ISA is 'mmx', this machine allows portable" in done.stderr


@pytest.mark.slow("kernels")
def test_an_instruction_set_that_was_not_built_is_refused():
    missing = sorted(set(ISAS) - set(library.built_isas()))
    if not missing:
        pytest.skip("all are built")
    assert f"built for ({','.join(library.built_isas())})" in isa_under(missing[0]).stderr


def configure(tmp_path: Path, isas: str) -> subprocess.CompletedProcess[str]:
    """Run CMake's configuration with the option DLLM_ISAS."""
    torch_dir = Path(torch.__file__).parent
    command = [Path(sys.executable).with_name("cmake"), "-S", ROOT, "-B", tmp_path, "-GNinja", "-DDLLM_CUDA=OFF"]
    command += [f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja', path=Path(sys.executable).parent)}"]
    command += [f"-DTORCH_DIR={torch_dir}", f"-DDLLM_ISAS={isas}"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow("kernels")
@pytest.mark.parametrize("isas", ["avx2;mmx", "best", ""])
def test_unknown_instruction_sets_are_not_built(isas, tmp_path):
    done = configure(tmp_path, isas)
    assert done.returncode == 1
    assert f"DLLM_ISAS is '{isas}'; allowed here are portable" in " ".join(done.stderr.split())


@pytest.mark.slow("kernels")
def test_native_is_the_best_of_the_machine(tmp_path):
    built = re.search(r"CPU kernels for (.*)", configure(tmp_path, "native").stdout)[1].split(";")
    assert built == list(dict.fromkeys(["portable", library.machine_isa()]))


def test_portable_is_built_always():
    assert library.built_isas()[0] == "portable"
    assert library.cpu_isa() in library.built_isas()
    assert set(library.built_isas()) | {library.machine_isa()} <= set(ISAS)


def test_it_names_architectures_where_it_has_kernels_for_them():
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key("vllm_dllm::vocab_stats", "CUDA")
    assert bool(library.cuda_archs()) == has_kernel
    assert torch.version.cuda is not None or not has_kernel


@pytest.mark.gpu
def test_built_for_the_gpu_at_hand():
    """The library names the architecture of the GPU, or an older one with PTX."""
    capability = 10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1]
    assert min(int(arch.rstrip("af")) for arch in library.cuda_archs()) <= capability
