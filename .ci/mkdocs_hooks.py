"""Hooks of mkdocs.yml: the pages stay as the forge shows them, the site takes in what they lead to outside docs/.

README, CONTRIBUTING and the page of the references become pages, pictures are added as they are, any other file as a
plain text copy; links between all of them are rewritten. Formulas become MathML, which browsers draw by themselves.
"""

from __future__ import annotations

import html
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "README.md": "project.md",
    "CONTRIBUTING.md": "contributing.md",
    "results/references/README.md": "references.md",
}
"""What is a page of the site and lies outside docs/. (A page README.md would take the place of index.md.)"""
SOURCES = {page: source for source, page in PAGES.items()}
PICTURES = {".png", ".svg", ".jpg"}
LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
FENCED = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
DOUBLE_STRUCK = re.compile(r'<mi mathvariant="double-struck">([ENPQRZ])</mi>')
LETTERS = dict(zip("ENPQRZ", "𝔼ℕℙℚℝℤ", strict=True))
FUNCTION = re.compile(r"<(m[io])>([A-Za-z]{2,})</\1>")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and files outside docs/ that pages lead to."""
    wanted = dict(PAGES)
    for source in [f"docs/{file.src_uri}" for file in files.documentation_pages()] + list(PAGES):
        wanted |= {target: _in_site(target) for _, target in _targets(source) if _outside(target)}
    for target, uri in sorted(wanted.items()):
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links that leave docs/, or come from outside it, lead to where the site has their targets."""
    here = page.file.src_uri
    source = SOURCES.get(here, f"docs/{here}")
    leads = {link: target for link, target in _targets(source) if source in PAGES or _outside(target)}

    def turned(found: re.Match[str]) -> str:
        before, link, after = found.groups()
        if link not in leads:
            return found[0]
        return before + posixpath.relpath(_in_site(leads[link]), posixpath.dirname(here) or ".") + after

    parts = FENCED.split(markdown)
    return "".join(part if part.startswith("```") else LINK.sub(turned, part) for part in parts)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the formulas that pymdownx.arithmatex has marked into MathML."""

    def drawn(found: re.Match[str]) -> str:
        display = "block" if found[2] == "[" else "inline"
        return _as_browsers_draw_it(convert(html.unescape(found[3]).strip(), display=display))

    return FORMULA.sub(drawn, content)


def _as_browsers_draw_it(formula: str) -> str:
    """MathML Core has no `mathvariant` but normal, and no room around the names of functions."""
    formula = DOUBLE_STRUCK.sub(lambda found: f"<mi>{LETTERS[found[1]]}</mi>", formula)
    return FUNCTION.sub(r'<mo form="prefix" lspace="0.17em" rspace="0.17em">\2</mo>', formula)


def _targets(source: str) -> Iterator[tuple[str, str]]:
    """The links of a file to files of the repository: as they stand, and from the root."""
    for _, link, _ in LINK.findall(FENCED.sub("", (ROOT / source).read_text(encoding="utf-8"))):
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
        if not re.match(r"[a-z]+:", link) and (ROOT / target).is_file():
            yield link, target


def _outside(target: str) -> bool:
    return not target.startswith("docs/")


def _in_site(target: str) -> str:
    """Where a file of the repository stands in the site."""
    if not _outside(target):
        return target.removeprefix("docs/")
    return PAGES.get(target) or f"files/{target}{'' if Path(target).suffix in PICTURES else '.txt'}"
