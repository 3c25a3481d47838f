"""Build csrc/ with CMake against the installed torch. All metadata is in pyproject.toml."""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext


def torch_dir() -> Path:
    """Find torch without importing it: pip's build isolation hides it from `import`, not on the disk."""
    spec = importlib.util.find_spec("torch")
    found = [Path(spec.origin).parent] if spec and spec.origin else []
    for path in [*found, *(Path(sysconfig.get_path(key)) / "torch" for key in ("platlib", "purelib"))]:
        if (path / "include/torch/csrc/stable/library.h").is_file():
            return path
    raise SystemExit(
        f"vllm-dllm: no torch 2.10 or newer is installed for {sys.executable}; the ops are built against the torch of "
        "your vLLM. Install vLLM first; with another installer than pip, add --no-build-isolation."
    )


class CMakeBuild(build_ext):
    """Run CMake. The library is loaded by torch and holds no Python module: its name has no Python tag."""

    def get_ext_filename(self, fullname: str) -> str:
        """Name the library."""
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Configure and build."""
        tools = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
        cmake = shutil.which("cmake", path=tools) or "cmake"
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        args = [f"-DTORCH_DIR={torch_dir()}", f"-DOUTPUT_DIR={output}", "-DCMAKE_BUILD_TYPE=Release"]
        if ninja := shutil.which("ninja", path=tools):
            args += ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        args += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        subprocess.run([cmake, "-S", Path(__file__).parent, "-B", self.build_temp, *args], check=True)
        subprocess.run([cmake, "--build", self.build_temp, "--parallel", "--target", "_C"], check=True)


class PlatformWheel(bdist_wheel):
    """Tag the wheel for every Python 3 of this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        """Replace the interpreter and ABI tags."""
        return "py3", "none", super().get_tag()[2]


commands = {"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel}
setup(ext_modules=[Extension("vllm_dllm._C", sources=[])], cmdclass=commands)
