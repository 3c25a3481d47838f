"""The documents as a site: it builds strictly, loads nothing from elsewhere, links lead somewhere, no text is lost."""

import os
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from markdown_it import MarkdownIt

from tests.tree import ROOT
from vllm_dllm.config import DllmConfig, request_keys
from vllm_dllm.spiffy_config import SpiffyConfig

CONTENT = re.compile(r"<article.*?</article>", re.DOTALL)
COUNTED = ("li", "table", "pre", "img", "h1", "h2", "h3")


class Links(HTMLParser):
    """The links of a page, what it loads, its anchors, and how often it has each element."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.ids: set[str] = set()
        self.elements: Counter[str] = Counter()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.elements[tag] += 1
        self.ids.add(given.get("id", ""))
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "link" and given.get("rel") not in ("next", "prev"):
            self.loads.append(given["href"])
        elif "src" in given:
            self.loads.append(given["src"])


def build(folder: Path, *more: str) -> "subprocess.CompletedProcess[str]":
    """Build the site into a folder."""
    # Without --quiet, under which --strict counts no warning. And a proxy that refuses: nothing may be fetched.
    nowhere = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder), *more]
    return subprocess.run(command, cwd=ROOT, env=os.environ | nowhere, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Links]:
    return {path: Links(path.read_text()) for path in site.rglob("*.html") if path.name != "404.html"}


@pytest.mark.parametrize(
    ("page", "warning"),
    [
        ("[x](no-such.md)", "no-such.md"),
        ("[x](#no-such-anchor)", "no-such-anchor"),
        ("[x](/index.md)", "absolute link"),
    ],
)
def test_what_is_wrong_on_a_page_ends_the_build(tmp_path: Path, page: str, warning: str) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/index.md").write_text(f"# Title\n\n{page}\n")
    (tmp_path / "mkdocs.yml").write_text(
        f"INHERIT: {ROOT / 'mkdocs.yml'}\ndocs_dir: docs\nhooks: []\nnav: [index.md]\nextra_css: []\n"
    )
    done = build(tmp_path / "site", "--config-file", str(tmp_path / "mkdocs.yml"))
    assert done.returncode == 1
    assert warning in done.stderr


def test_links_and_anchors_exist(pages: dict[Path, Links]) -> None:
    assert len(pages) > 40
    wrong = []
    for path, page in pages.items():
        for link in [*page.links, *page.loads]:
            parts = urlsplit(link)
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if parts.scheme:
                continue
            anchor = unquote(parts.fragment)
            is_known = not anchor or target not in pages or anchor in pages[target].ids
            if not (target.is_file() and is_known):
                wrong.append(f"{path.name}: {link}")
    assert not wrong


def test_pages_load_nothing_from_elsewhere(pages: dict[Path, Links]) -> None:
    assert not [load for page in pages.values() for load in page.loads if urlsplit(load).netloc]


@pytest.mark.parametrize(
    "name", sorted(path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md"))
)
def test_a_page_has_what_github_shows(site: Path, name: str) -> None:
    text = (ROOT / "docs" / name).read_text()
    github = Links(MarkdownIt("commonmark", {"html": True}).enable("table").render(text)).elements
    html = (site / name.replace("README.md", "index.md")).with_suffix(".html").read_text()
    (article,) = CONTENT.findall(html)
    built = Links(article).elements
    assert {each: built[each] for each in COUNTED} == {each: github[each] for each in COUNTED}


def test_the_reference_has_every_field(site: Path) -> None:
    for page, names in (
        ("server", DllmConfig.model_fields),
        ("requests", request_keys()),
        ("speculative-config", SpiffyConfig.model_fields),
        ("commands", ("vllm-dllm calibrate", "vllm-dllm graph merge", "vllm-dllm bench decode", "vllm-dllm doctor")),
        ("python", ("TorchPolicy", "Parameter", "StateField")),
    ):
        html = (site / f"reference/{page}.html").read_text()
        assert [name for name in names if f">{name}<" not in html] == []
