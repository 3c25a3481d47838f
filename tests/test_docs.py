"""The documentation's links lead somewhere and its commands name things that exist."""

import ast
import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("docs/**/*.md"))]

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
REPO_PATH = re.compile(r"(?<![\w/.-])(?:examples|scripts|tests|docs|csrc|requirements)/[\w./-]*\w")


def without_code(text: str) -> str:
    return CODE_BLOCK.sub("", text)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", without_code(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.fixture(params=PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def page(request) -> Path:
    return request.param


def test_links_lead_somewhere(page):
    for link in LINK.findall(without_code(page.read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{link} does not exist"
        assert not anchor or anchor in anchors(target), f"{link}: no such heading"


def test_commands_name_things_that_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for language, code in CODE_BLOCK.findall(page.read_text()):
        if language not in {"bash", "sh", "console"}:
            continue
        assert set(re.findall(r"^\$? ?make ([a-z-]+)", code, re.MULTILINE)) <= targets
        for module in re.findall(r"python\d? -m (vllm_dllm[\w.]*)", code):
            stem = ROOT / module.replace(".", "/")
            assert stem.with_suffix(".py").is_file() or (stem / "__main__.py").is_file(), module
        for path in REPO_PATH.findall(code):
            assert (ROOT / path).exists(), path


def test_python_blocks_parse(page):
    for language, code in CODE_BLOCK.findall(page.read_text()):
        if language == "python":
            ast.parse(code)


def test_shell_blocks_call_known_programs(page):
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
    }
    for language, code in CODE_BLOCK.findall(page.read_text()):
        if language not in {"bash", "sh"}:
            continue
        for command in re.sub(r"\\\n", " ", code).splitlines():
            words = [word for word in command.split() if not re.match(r"[A-Z_0-9]+=", word)]
            if not words or words[0].startswith("#") or command[0] in " '}":
                continue
            is_ours = words[0].startswith(".venv/bin/") or (ROOT / words[0]).exists()
            assert words[0] in known or is_ours or shutil.which(words[0]), command
