"""Hooks for MkDocs."""

from __future__ import annotations

import re
from itertools import cycle
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add CHANGELOG.md, which is outside docs/."""
    text = (ROOT / "CHANGELOG.md").read_text()
    files.append(File.generated(config, "changes.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Remove the backslash from `\\|` in tables: GitHub needs it, Python-Markdown shows it."""
    return re.sub(r"`[^`\n]*`", lambda code: code[0].replace("\\|", "|"), markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let code break after `|` and `/`, and label the cells of stacked tables for docs/site.css."""
    html = re.sub(r"<code>[^<\n]*</code>", _breakable, html)
    return re.sub(r'(?s)<div class="stacked">.*?</div>', _labelled, html)


def _breakable(code: re.Match[str]) -> str:
    return re.sub(r"(?<!<)[|/]", r"\g<0><wbr>", code[0])


def _labelled(table: re.Match[str]) -> str:
    """A table whose cells have the name of their column as `data-label`."""
    names = cycle(re.findall(r"<th>(.*?)</th>", table[0]))
    return re.sub("<td>", lambda _: f'<td data-label="{next(names)}">', table[0])
