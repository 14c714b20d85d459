"""Hooks for MkDocs."""

from __future__ import annotations

import re
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
