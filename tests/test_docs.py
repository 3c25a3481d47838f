"""The documentation's links lead somewhere and its commands name things that exist."""

import ast
import re
import shlex
import shutil
from pathlib import Path

import pytest
import typer

from benchmarks.__main__ import app as benchmarks
from vllm_dllm.cli import main
from vllm_dllm.config import DllmConfig
from vllm_dllm.draft.provenance import calibrate_command

ROOT = Path(__file__).parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *(ROOT / folder / "README.md" for folder in ("benchmarks", "tests/simt")),
    *sorted(ROOT.glob("docs/**/*.md")),
]

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
TABLE = re.compile(r"(?:^\|.*\n)+", re.MULTILINE)
CODE_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
TEST_NAME = re.compile(r"`(test_\w+\.py)::(test_\w+)`")
LEFT = re.compile(r"@[A-Z_]+@|\b(?:TODO|FIXME)\b")
MODULE = re.compile(r"python\d? -m ((?:vllm_dllm|benchmarks)[\w.]*)")
REPO_PATH = re.compile(r"(?<![\w/.-])(?:benchmarks|examples|scripts|tests|docs|csrc|requirements)/[\w./-]*\w")


def without_code(text: str) -> str:
    return CODE_BLOCK.sub("", text)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", without_code(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def code_blocks(*languages: str) -> list[tuple[str, str]]:
    """The code of these languages on all pages, each with its page's name."""
    return [
        (page.relative_to(ROOT).as_posix(), code)
        for page in PAGES
        for language, code in CODE_BLOCK.findall(page.read_text())
        if language in languages
    ]


def test_tables_are_whole():
    tables = [(page.name, t) for page in PAGES for t in TABLE.findall(without_code(page.read_text()))]
    assert len(tables) > 100
    wrong = [(page, t[:80]) for page, t in tables if not re.match(r".*\n\|[ :|-]+\|\n", t)]
    assert not wrong, "rows without a head, as below an empty line: they are shown as text"


def test_links_lead_somewhere():
    wrong = []
    for page in PAGES:
        links = [link for link in LINK.findall(without_code(page.read_text())) if not re.match(r"[a-z]+:", link)]
        for link in links:
            name, _, anchor = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            if not target.exists() or (anchor and anchor not in anchors(target)):
                wrong.append(f"{page.name}: {link}")
    assert not wrong, "links to files or headings that do not exist"


def test_nothing_is_left_to_fill_in():
    left = [f"{page.name}: {each}" for page in PAGES for each in LEFT.findall(page.read_text())]
    assert not left, "placeholders"


def is_module(name: str) -> bool:
    stem = ROOT / name.replace(".", "/")
    return stem.with_suffix(".py").is_file() or (stem / "__main__.py").is_file()


def test_commands_name_things_that_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    wrong = []
    for page, code in code_blocks("bash", "sh", "console"):
        named = set(re.findall(r"^\$? ?make ([a-z-]+)", code, re.MULTILINE)) - targets
        named |= {name for name in MODULE.findall(code) if not is_module(name)}
        named |= {path for path in REPO_PATH.findall(code) if not (ROOT / path).exists()}
        wrong += [f"{page}: {name}" for name in named]
    assert not wrong, "targets, modules and files that do not exist"


def test_figures_of_the_readme_are_in_the_benchmarks():
    text = (ROOT / "README.md").read_text()
    tables = re.findall(r"^\|.*\|$", text, re.MULTILINE)
    figures = set(re.findall(r"\b\d+\.\d\d\b", "\n".join(tables)))
    assert len(figures) >= 12
    measured = (ROOT / "docs/benchmarks.md").read_text()
    assert [figure for figure in figures if not re.search(rf"\b{re.escape(figure)}\b", measured)] == []


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_tests_that_pages_name_exist():
    tests = list(ROOT.glob("tests/**/test_*.py"))
    wrong = [
        f"{page.name}: {file}::{name}"
        for page in PAGES
        for file, name in TEST_NAME.findall(page.read_text())
        if not any(path.name == file and f"def {name}(" in path.read_text() for path in tests)
    ]
    assert not wrong


def test_the_architecture_names_every_module_of_the_package():
    package = ROOT / "vllm_dllm"
    tree = (ROOT / "docs/architecture.md").read_text().partition("## The tree")[2]
    named = set(re.findall(r"`([\w/]+?)(?:\.py|/)?`", tree))
    modules = {path.stem for folder in (package, package / "engine") for path in folder.glob("*.py")} - {"__init__"}
    packages = {path.parent.name for path in package.glob("*/__init__.py")}
    assert {"denoiser", "scheduler"} <= modules
    assert not (modules | packages) - named


def test_python_blocks_parse():
    blocks = code_blocks("python")
    assert blocks
    for page, code in blocks:
        ast.parse(code, page)


def test_shell_blocks_call_known_programs():
    known = {
        "make",
        "pip",
        "python",
        "python3",
        "vllm",
        "vllm-dllm",
        "git",
        "cd",
        "export",
        "curl",
        "source",
        "sudo",
        "apt",
        "docker",
        "kubectl",
    }
    wrong = []
    for page, code in code_blocks("bash", "sh"):
        for command in re.sub(r"\\\n", " ", code).splitlines():
            words = [word for word in command.split() if not re.match(r"[A-Z_0-9]+=", word)]
            if not words or words[0].startswith("#") or command[0] in " '}":
                continue
            is_ours = words[0].startswith(".venv/bin/") or (ROOT / words[0]).exists()
            if not (words[0] in known or is_ours or shutil.which(words[0])):
                wrong.append(f"{page}: {command}")
    assert not wrong, "commands of unknown programs"


UsageError = typer.BadParameter.__mro__[1]  # of the copy of click in typer, where it has no public name


PROGRAMS = {"vllm-dllm": main.app, "python -m benchmarks": benchmarks}


def parse(command: str) -> None:
    """Read a command of ours as its program does, without running it.

    Raises: UsageError for a command or an option that does not exist, and for one that is missing.
    """
    program = next(name for name in PROGRAMS if command.startswith(f"{name} "))
    found, words = typer.main.get_command(PROGRAMS[program]), shlex.split(command.removeprefix(program))
    if words and any(words[0] in param.opts for param in found.params):  # an option of the program itself
        return
    while commands := getattr(found, "commands", None):
        if not words or words[0] not in commands:
            raise UsageError(f"no command in {command}")
        found, words = commands[words[0]], words[1:]
    found.make_context(command, words)


def own_commands() -> list[str]:
    blocks = (code.replace("\\\n", " ") for _, code in code_blocks("bash", "sh", "console"))
    ours = re.compile(rf"^(?:\$ )?((?:{'|'.join(PROGRAMS)}) .*)", re.MULTILINE)
    return [command for code in blocks for command in ours.findall(code)]


def test_our_commands_are_accepted():
    for command in own_commands():
        parse(command)


def test_pages_show_every_command():
    shown = "\n".join(own_commands())
    for name in ("calibrate", "graph show", "graph check", "graph merge", "bench decode", "doctor"):
        assert re.search(rf"vllm-dllm {name}\b", shown)
    for name in ("reference", "stages", "kernels"):
        assert re.search(rf"python -m benchmarks {name}\b", shown)


@pytest.mark.parametrize(
    "settings",
    [
        DllmConfig(block_length=8),
        DllmConfig(policy="random", steps_per_block=4),
        DllmConfig(policy="threshold", threshold=0.8),
        DllmConfig(policy="factor", factor=1.5),
        DllmConfig(kv_policy="prefix"),
        DllmConfig(refresh_every=4),
    ],
    ids=lambda settings: settings.model_dump_json(exclude_defaults=True),
)
def test_commands_in_messages_are_accepted(settings):
    for model in (None, "/models/with space/llada", "GSAI-ML/LLaDA-8B-Instruct"):
        parse(calibrate_command(settings, model))


@pytest.mark.parametrize(
    "command",
    [
        "vllm-dllm calibrate MODEL --prompts P -o F --degree 1",
        "vllm-dllm calibrate MODEL -o F",
        "vllm-dllm calibrate MODEL --prompts P -o F --policy best",
        "vllm-dllm bench decide --model M --prompts P",
        "vllm-dllm bench kernels",
        "python -m benchmarks kernels --model M",
        "vllm-dllm graph",
    ],
)
def test_wrong_commands_are_not_accepted(command):
    with pytest.raises(UsageError):
        parse(command)
