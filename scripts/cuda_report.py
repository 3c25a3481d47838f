"""Print what each CUDA kernel takes of a multiprocessor, as ptxas reports it: a Markdown table.

    python scripts/cuda_report.py [ARCH ...]

Dynamic shared memory is chosen at the launch and not in it.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

CSRC = Path(__file__).parent.parent / "csrc"
ARCHS = ("sm_80", "sm_90a")

ENTRY = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)' for '(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def ptxas_output(source: Path, arch: str) -> str:
    """Compile a source and return what ptxas says of it."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", "-std=c++20", f"-arch={arch}", "-Xptxas", "-v", "-I", str(CSRC / "include")]
        command += ["-c", str(source), "-o", str(Path(folder) / "object.o")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"cuda_report: {source} does not compile for {arch}:\n{done.stderr}")
    return done.stderr


def rows(output: str) -> Iterator[list[str]]:
    """Yield kernel, architecture, registers, static shared memory, stack and spills of each kernel."""
    for entry in ENTRY.finditer(output):
        shared = re.search(r"(\d+) bytes smem", entry["rest"])
        spills = int(entry["stores"]) + int(entry["loads"])
        kernel = demangled(entry["kernel"])
        yield [
            f"`{kernel}`",
            entry["arch"],
            entry["registers"],
            shared[1] if shared else "0",
            entry["stack"],
            str(spills),
        ]


def demangled(name: str) -> str:
    """Return a kernel's name with its template arguments, without namespaces and parameters."""
    full = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout.strip()
    shortened = re.sub(r"\(anonymous namespace\)::|dllm::|cuda::|^void ", "", full)
    return re.sub(r"\((?:[^()]|\([^()]*\))*\)$", "", shortened)


def main(archs: tuple[str, ...]) -> None:
    """Compile all sources, two at a time."""
    missing = [program for program in ("nvcc", "c++filt") if shutil.which(program) is None]
    if missing:
        raise SystemExit(f"cuda_report: {' and '.join(missing)} not on PATH; install the CUDA toolkit and binutils")
    jobs = list(product(sorted((CSRC / "cuda").glob("*.cu")), archs))
    with ThreadPoolExecutor(2) as pool:
        outputs = list(pool.map(lambda job: ptxas_output(*job), jobs))
    header = ["kernel", "arch", "registers", "static shared, bytes", "stack, bytes", "spills, bytes"]
    lines = [header, ["---"] * len(header), *sorted(row for output in outputs for row in rows(output))]
    sys.stdout.writelines(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    main(tuple(sys.argv[1:]) or ARCHS)
