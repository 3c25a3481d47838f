"""Hooks of mkdocs (mkdocs.yml): the repository's other pages in the site, its links, and the generated reference."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

from scripts.site_reference import reference_pages

ROOT = Path(__file__).parents[1]
PLACES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Pages outside docs/ that the navigation has."""
LINK = re.compile(r"(\]\()([^)\s:#]+)(?=[#)])")
CODE = re.compile(r"(^```.*?^```|`[^`\n]+`)", re.MULTILINE | re.DOTALL)


def place(path: str) -> str:
    """Return where the site has a file of the repository, both as paths from the root."""
    if path in PLACES:
        return PLACES[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else f"repository/{path}"


def target_of(link: str, page: str) -> str:
    """Return the file of the repository that a relative link on a page leads to; that of a folder is its README.md."""
    path = os.path.normpath(Path(page).parent / link)
    return f"{path}/README.md" if (ROOT / path).is_dir() else path


def parts(markdown: str) -> Iterator[tuple[str, bool]]:
    """Cut a page into code and what is none."""
    for number, part in enumerate(CODE.split(markdown)):
        yield part, number % 2 == 1


def linked(page: str) -> set[str]:
    """Return the files of the repository that a page links to."""
    texts = [part for part, is_code in parts((ROOT / page).read_text()) if not is_code]
    return {target_of(link, page) for text in texts for _, link in LINK.findall(text)}


def content(path: str) -> str | bytes:
    """Return a file of the repository, or for a folder's missing README.md a list of its files."""
    file = ROOT / path
    if file.is_file():
        return file.read_text() if file.suffix == ".md" else file.read_bytes()
    names = sorted(each.name for each in file.parent.iterdir() if not each.name.startswith(("_", ".")))
    return f"# {file.parent.relative_to(ROOT)}\n\n" + "\n".join(f"- `{name}`" for name in names)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what pages link to outside docs/, and what those link to, and the reference."""
    for name, text in reference_pages().items():
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    waiting = [*PLACES, *(f"docs/{file.src_uri}" for file in files.documentation_pages() if not file.generated_by)]
    seen = set(waiting)
    while waiting:
        path = waiting.pop()
        if not path.startswith("docs/"):
            level = InclusionLevel.UNDEFINED if path in PLACES else InclusionLevel.NOT_IN_NAV
            files.append(File.generated(config, place(path), content=content(path), inclusion=level))
        if path.endswith(".md") and (ROOT / path).is_file():
            new = linked(path) - seen
            seen |= new
            waiting += new
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Turn the links of the repository into those of the site."""
    at = page.file.src_uri
    origin = next((path for path, moved in PLACES.items() if moved == at), None)
    if origin is None:
        origin = at.removeprefix("repository/") if at.startswith("repository/") else f"docs/{at}"

    def moved(found: re.Match[str]) -> str:
        return found[1] + os.path.relpath(place(target_of(found[2], origin)), Path(at).parent)

    return "".join(part if is_code else LINK.sub(moved, part) for part, is_code in parts(markdown))
