"""What users install: the source distribution builds, and the wheel made of it holds all that is needed and loads."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.ops.isas import run_tests
from tests.tree import ROOT, tracked

ISAS = ("portable", "avx2", "avx512", "avx512_bf16")
ISA = "import vllm_dllm.ops.library as library; print(library.cpu_isa())"
DECODE = "import vllm_dllm.measure.decode; from vllm_dllm.cli.main import main; main()"
USE = "import vllm_dllm.ops.library as library; print(library.__file__, library.cpu_isa())"


@pytest.fixture(scope="module", params=["native", pytest.param("all", marks=pytest.mark.slow("isas"))])
def dist(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the source distribution, and a wheel from it alone, for the machine's instruction set or as released."""
    folder = tmp_path_factory.mktemp("dist")
    sources = tmp_path_factory.mktemp("sources")  # setuptools lays the distribution out beside the files it is made of
    for path in tracked():
        copy = sources / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(sources)]
    environment = os.environ | {"CMAKE_ARGS": f"-DDLLM_CUDA=OFF -DDLLM_ISAS={request.param}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder


def only(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


def test_the_source_distribution_holds_the_sources(dist):
    with tarfile.open(only(dist, "*.tar.gz")) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    sources = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/**/*") if path.is_file()}
    assert sources | {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", "README.md"} <= files
    others = ("tests", "benchmarks", "examples", "build")
    assert not [name for name in files if name.startswith(others) or name.endswith(".so")]


def test_the_wheel_holds_the_package_and_its_library(dist):
    with zipfile.ZipFile(only(dist, "*.whl")) as wheel:
        files = {name for name in wheel.namelist() if ".dist-info/" not in name}
    package = ROOT / "vllm_dllm"
    expected = {path for suffix in ("py", "json", "html", "js") for path in package.glob(f"**/*.{suffix}")}
    expected |= {package / "py.typed", package / "_C.so"}
    assert files == {path.relative_to(ROOT).as_posix() for path in expected}


def test_the_wheel_serves_every_python_of_the_platform(dist):
    wheel = only(dist, "*.whl")
    assert wheel.name.split("-")[2:4] == ["py3", "none"]
    assert wheel.name.endswith(f"linux_{os.uname().machine}.whl")


def test_the_library_names_no_folder_of_the_build(dist):
    with zipfile.ZipFile(only(dist, "*.whl")) as wheel:
        library = wheel.read("vllm_dllm/_C.so")
    assert b"csrc/bindings" in library
    assert str(ROOT.resolve()).encode() not in library
    assert b"site-packages" not in library


def test_the_wheel_installs_loads_and_brings_its_commands(dist, tmp_path):
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(tmp_path)]
    subprocess.run([*install, str(only(dist, "*.whl"))], check=True)
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_DLLM_ISA"}
    environment["PYTHONPATH"] = str(tmp_path)

    def run(*words: str) -> str:
        command = [sys.executable, "-c", *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "--budgets" in run(DECODE, "bench", "decode", "--help")
    file, isa = run(USE).split()
    assert Path(file).is_relative_to(tmp_path)
    assert isa in ISAS


@pytest.mark.slow("isas")
@pytest.mark.parametrize("dist", ["all"], indirect=True)
def test_every_instruction_set_of_the_machine_equals_torch(dist, tmp_path):
    library = tmp_path / "_C.so"
    with zipfile.ZipFile(only(dist, "*.whl")) as wheel:
        library.write_bytes(wheel.read("vllm_dllm/_C.so"))
    ran = [isa for isa in ISAS if " passed" in run_tests(isa, library)]
    best = subprocess.run(
        [sys.executable, "-c", ISA], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert ran == list(ISAS[: ISAS.index(best) + 1])
