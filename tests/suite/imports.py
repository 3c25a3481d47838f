"""Which files of the repository a Python file needs to be imported, at once or within its functions."""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

from tests.tree import ROOT

PACKAGES = ("vllm_dllm", "tests", "benchmarks", "scripts", "examples")


def files_of(module: str) -> Iterator[Path]:
    """Return the file of a module of ours, and those of the packages that it is in."""
    parts = module.split(".")
    for length in range(1, 1 + len(parts)) if parts[0] in PACKAGES else ():
        path = ROOT.joinpath(*parts[:length])
        yield from (each for each in (path / "__init__.py", path.with_suffix(".py")) if each.is_file())


@functools.cache
def imported_by(path: Path) -> frozenset[Path]:
    """Return the files that a file names in its imports."""
    found: set[Path] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(file for name in node.names for file in files_of(name.name))
        elif isinstance(node, ast.ImportFrom) and node.module is not None and not node.level:
            found.update(file for name in node.names for file in files_of(f"{node.module}.{name.name}"))
    return frozenset(found - {path})


def needed_by(path: Path) -> set[Path]:
    """Return a file, the files that it imports, those that these import, and so on."""
    found, left = {path}, [path]
    while left:
        new = imported_by(left.pop()) - found
        found |= new
        left += new
    return found
