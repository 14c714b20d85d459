"""Generate the parts of docs/settings.md and docs/commands.md that come from the code.

usage: python scripts/docs_reference.py            # scripts/docs runs this before building the site
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import click

from occgen_hub.cli import cli
from occgen_hub.config import Config

DOCS = Path(__file__).parent.parent / "docs"


def main() -> None:
    for name in PARTS:
        page = DOCS / f"{name}.md"
        old = page.read_text()
        if (new := updated(old, name)) != old:
            page.write_text(new)


def updated(page: str, name: str) -> str:
    """A page's text with the part between <!-- name --> and <!-- end --> generated again."""
    begin, end = f"<!-- {name}: made by scripts/docs -->", "<!-- end -->"
    before, _, rest = page.partition(begin)
    _, marker, after = rest.partition(end)
    if not marker:
        raise ValueError(f"docs/{name}.md: {begin} or {end} is missing")
    return f"{before}{begin}\n\n{PARTS[name]()}\n\n{end}{after}"


def command_reference() -> str:
    """A section for each command: usage, help, options, example."""
    top = click.Context(cli, info_name="occgen-hub")
    return "\n\n".join(
        section
        for name in cli.list_commands(top)
        for section in _sections(cli.commands[name], name, top)
    )


def _sections(command: click.Command, name: str, parent: click.Context) -> list[str]:
    context = click.Context(command, info_name=name, parent=parent)
    if isinstance(command, click.Group):
        inner = command.commands.items()
        return [part for sub, made in inner for part in _sections(made, sub, context)]
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    rows = [
        "| `{}` | {} |".format(names.replace("|", r"\|"), _escaped(text))
        for option in command.get_params(context)
        if (record := option.get_help_record(context))
        for names, text in [record]
        if text and "--help" not in names
    ]
    example = getattr(command, "example", "")
    parts = [
        f"## {context.command_path.removeprefix('occgen-hub ')}",
        f"```text\n{usage}\n```",
        _escaped(command.help or ""),
        _stacked(["| option | meaning |", "| --- | --- |", *rows]) if rows else "",
        f"```text\n{example}\n```" if example else "",
    ]
    return ["\n\n".join(filter(None, parts))]


def _escaped(text: str) -> str:
    """Escape text so that Markdown finds no links, columns, emphasis or HTML in it."""
    text = inspect.cleandoc(text).replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\[\]|*_])", r"\\\1", text)


def _stacked(rows: list[str]) -> str:
    """A table whose cells are below one another on a phone, by docs/site.css."""
    return "\n".join(['<div class="stacked" markdown>', "", *rows, "", "</div>"])


def settings_table() -> str:
    """A row for each field of `Config`: name, default, values, description."""
    rows = ["| setting | default | values | meaning |", "| --- | --- | --- | --- |"]
    for name, field in Config.model_fields.items():
        kind = " or ".join(dict.fromkeys(_values(field.annotation)))
        limits = ", ".join(filter(None, map(_limit, field.metadata)))
        kind += f", {limits}" if limits else ""
        rows.append(f"| `{name}` | {_default(field.default)} | {kind} | {field.description} |")
    return _stacked(rows)


def _default(value: Any) -> str:
    if value is None or value == ():
        return "not set"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{list(value)}`" if isinstance(value, tuple) else f"`{value}`"


def _values(annotation: Any) -> list[str]:
    """Describe the values of an annotation."""
    names = {float: "number", int: "whole number", bool: "`true`, `false`"}
    if annotation is type(None):  # Not set.
        return []
    if annotation in names:
        return [names[annotation]]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return [", ".join(f"`{value}`" for value in arguments)]
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return [f"list of {' or '.join(_values(arguments[0]))}"]
        return [f"{len(arguments)} numbers"]
    if hasattr(annotation, "__metadata__"):
        limits = ", ".join(filter(None, (_limit(m) for m in annotation.__metadata__)))
        inner = " or ".join(_values(annotation.__origin__))
        return [f"{inner}, {limits}" if limits else inner]
    if origin is Union or type(annotation).__name__ == "UnionType":
        return [words for argument in arguments for words in _values(argument)]
    raise TypeError(f"{annotation}: _values cannot describe it; add it there")


def _limit(constraint: Any) -> str:
    """Describe a bound, or the bounds in a pydantic FieldInfo."""
    if hasattr(constraint, "metadata"):
        return ", ".join(filter(None, map(_limit, constraint.metadata)))
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    return ", ".join(
        f"{sign} {getattr(constraint, name):,}"
        for name, sign in signs.items()
        if getattr(constraint, name, None) is not None
    )


PARTS = {"settings": settings_table, "commands": command_reference}
"""The pages with generated parts, and the functions that generate them."""


if __name__ == "__main__":
    main()
