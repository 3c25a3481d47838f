"""What users install: the source distribution builds, and the wheel made of it holds all that is needed and loads.

Every run makes the source distribution and the Python part of a wheel; the kernels are compiled where they changed.
"""

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


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy what git tracks: setuptools lays a distribution out beside the files that it is made of."""
    folder = tmp_path_factory.mktemp("sources")
    for path in tracked():
        copy = folder / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    return folder


def build(*words: str, **environment: str) -> None:
    command = [sys.executable, "-m", "build", "--no-isolation", *words]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.fixture(scope="module")
def source_dist(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source_dist")
    build("--sdist", "--outdir", str(folder), str(sources))
    return only(folder, "*.tar.gz")


@pytest.fixture(scope="module", params=["native", "all"])
def wheel(request: pytest.FixtureRequest, sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel from the source distribution alone, for the machine's instruction set or as released."""
    folder = tmp_path_factory.mktemp("dist")
    build("--outdir", str(folder), str(sources), CMAKE_ARGS=f"-DDLLM_CUDA=OFF -DDLLM_ISAS={request.param}")
    return only(folder, "*.whl")


def package_files(*more: str) -> set[str]:
    package = ROOT / "vllm_dllm"
    found = {path for suffix in ("py", "json", "html", "js") for path in package.glob(f"**/*.{suffix}")}
    return {path.relative_to(ROOT).as_posix() for path in (*found, package / "py.typed", *(package / n for n in more))}


def only(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


def test_the_source_distribution_holds_the_sources(source_dist):
    with tarfile.open(source_dist) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    sources = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/**/*") if path.is_file()}
    assert sources | {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", "README.md"} <= files
    others = ("tests", "benchmarks", "examples", "build")
    assert not [name for name in files if name.startswith(others) or name.endswith(".so")]


def test_the_source_distribution_gives_the_package_to_a_wheel(source_dist, tmp_path):
    """But for the library, which takes a minute to compile."""
    with tarfile.open(source_dist) as archive:
        archive.extractall(tmp_path, filter="data")
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path / "lib")]
    (folder,) = tmp_path.glob("vllm_dllm-*")
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    found = {path.relative_to(tmp_path / "lib").as_posix() for path in (tmp_path / "lib").rglob("*") if path.is_file()}
    assert found == package_files()


@pytest.mark.slow("isas")
def test_the_wheel_holds_the_package_and_its_library(wheel):
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert files == package_files("_C.so")


@pytest.mark.slow("isas")
def test_the_wheel_serves_every_python_of_the_platform(wheel):
    assert wheel.name.split("-")[2:4] == ["py3", "none"]
    assert wheel.name.endswith(f"linux_{os.uname().machine}.whl")


@pytest.mark.slow("isas")
def test_the_library_names_no_folder_of_the_build(wheel):
    with zipfile.ZipFile(wheel) as archive:
        library = archive.read("vllm_dllm/_C.so")
    assert b"csrc/bindings" in library
    assert str(ROOT.resolve()).encode() not in library
    assert b"site-packages" not in library


@pytest.mark.slow("isas")
def test_the_wheel_installs_loads_and_brings_its_commands(wheel, tmp_path):
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(tmp_path)]
    subprocess.run([*install, str(wheel)], check=True)
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
@pytest.mark.parametrize("wheel", ["all"], indirect=True)
def test_every_instruction_set_of_the_machine_equals_torch(wheel, tmp_path):
    library = tmp_path / "_C.so"
    with zipfile.ZipFile(wheel) as archive:
        library.write_bytes(archive.read("vllm_dllm/_C.so"))
    ran = [isa for isa in ISAS if " passed" in run_tests(isa, library)]
    best = subprocess.run(
        [sys.executable, "-c", ISA], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert ran == list(ISAS[: ISAS.index(best) + 1])
