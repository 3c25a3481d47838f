"""Make .venv-033: this checkout's environment with vLLM 0.33, of which there is no build for CPUs.

The Python files of the wheels in requirements/vllm-033.txt are laid over the compiled modules of the CPU build of vLLM
0.32 that .venv has; all other packages are those of .venv. Run with .venv's Python; does nothing when that is done.
"""

import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
REQUIREMENTS = ROOT / "requirements/vllm-033.txt"
WHEELS = ROOT / "build/wheels-033"
TARGET = ROOT / ".venv-033"
STAMP = TARGET / ".overlay"


def download() -> list[Path]:
    """Return the wheels, downloaded where they are not there."""
    options = ["--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "-qq", "-d", str(WHEELS)]
    subprocess.run([sys.executable, "-m", "pip", "download", *options, "-r", str(REQUIREMENTS)], check=True)
    return sorted(WHEELS.glob("*.whl"))


def unpack(wheel: Path, site: Path) -> None:
    """Unpack a wheel; vLLM's without its compiled modules, which need CUDA, and as a build for CPUs by its version."""
    is_vllm = wheel.name.startswith("vllm-")
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if is_vllm and name.endswith(".so"):
                continue
            archive.extract(name, site)
    if not is_vllm:
        return
    (info,) = site.glob("vllm-*.dist-info")
    metadata = info / "METADATA"
    lines = metadata.read_text().split("\n")
    metadata.write_text("\n".join(f"{line}+cpu" if line.startswith("Version: ") else line for line in lines))
    (info / "RECORD").unlink()


def main() -> None:
    """Make it."""
    wanted = REQUIREMENTS.read_text() + Path(__file__).read_text()
    if STAMP.is_file() and STAMP.read_text() == wanted:
        return
    print("setup: laying vLLM 0.33 over the CPU build of 0.32")
    wheels = download()
    shutil.rmtree(TARGET, ignore_errors=True)
    venv.create(TARGET, with_pip=False)
    base = Path(sysconfig.get_path("purelib"))
    site = TARGET / base.relative_to(sys.prefix)
    for wheel in wheels:
        unpack(wheel, site)
    for module in (base / "vllm").glob("*.so"):
        shutil.copy(module, site / "vllm")
    (site / "base.pth").write_text(f"import site; site.addsitedir({str(base)!r})\n")
    for script in ("vllm", "vllm-dllm"):
        _, *lines = (Path(sys.prefix) / "bin" / script).read_text().splitlines(keepends=True)
        (TARGET / "bin" / script).write_text(f"#!{TARGET / 'bin/python'}\n{''.join(lines)}")
        (TARGET / "bin" / script).chmod(0o755)
    STAMP.write_text(wanted)


main()
