"""What the site adds to the pages, which a forge shows as they are. ``mkdocs.yml`` says why."""

from __future__ import annotations

import os
import posixpath
import re
from html import unescape
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

FOLDER = "repository"
DATA = (".json", ".jsonl", ".png", ".svg")  # what a browser shows as it is
# What a link or a picture leads to, where that is above the page's own folder.
ABOVE = re.compile(r"(?<=\]\()\.\./[^)#\s]+")
# Docstrings name other objects as Sphinx does, which Markdown does not know.
TEX = re.compile(r'<(div|span) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
ROLE = re.compile(r":(?:class|func|meth|mod|data):<code>[~.]*([^<]*)</code>")


def find_source(link: str, page: str, config: MkDocsConfig) -> str | None:
    """The path in the repository of the file beside ``docs/`` that a page links to; None where it links to none."""
    docs = Path(config.docs_dir)
    target = Path(os.path.normpath(docs / page / ".." / link))
    beside = target.is_file() and not target.is_relative_to(docs)
    return target.relative_to(docs.parent).as_posix() if beside else None


def place_of(source: str) -> str:
    """Where a file of the repository lies in the site."""
    return f"{FOLDER}/{source}" + ("" if source.endswith(DATA) else ".md")


def show_file(path: Path, name: str) -> str:
    """A page that shows a file of text, and that the search passes over."""
    fence = "`" * 8  # longer than any in the file
    text = path.read_text(encoding="utf-8")
    return f"---\nsearch: {{exclude: true}}\n---\n# {name}\n\n{fence}{path.suffix[1:]}\n{text.rstrip()}\n{fence}\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add each file of the repository that a page links to."""
    for page in list(files.documentation_pages()):
        for link in ABOVE.findall(page.content_string):
            source = find_source(link, page.src_uri, config)
            if source and place_of(source) not in files.src_uris:
                path = Path(config.docs_dir).parent / source
                data = source.endswith(DATA)
                content = {"abs_src_path": str(path)} if data else {"content": show_file(path, source)}
                place, inclusion = place_of(source), InclusionLevel.NOT_IN_NAV
                files.append(File.generated(config, place, inclusion=inclusion, **content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: Any) -> str:
    """Lead links to files of the repository to where they lie in the site."""
    own = page.file.src_uri
    if own.startswith(f"{FOLDER}/"):
        return markdown

    def lead(link: re.Match[str]) -> str:
        source = find_source(link[0], own, config)
        return posixpath.relpath(place_of(source), posixpath.dirname(own) or ".") if source else link[0]

    return ABOVE.sub(lead, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Show the names that docstrings mention as code, and formulas as MathML, which browsers draw by themselves."""
    html = TEX.sub(lambda found: convert(unescape(found[2]), display="block" if found[1] == "div" else "inline"), html)
    return ROLE.sub(r"<code>\1</code>", html)
