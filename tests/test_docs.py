"""The README and the site: every code block runs, every link works, nothing is out of date.

The blocks of a page run in order in one folder; commands run in this process if they can. A block
that cannot run has a comment with the reason before it: <!-- not run: reason -->.
"""

from __future__ import annotations

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import captures
import click
import pytest
from click.testing import CliRunner
from hub_server import WRITER, Hub

from occgen_hub.builder import load_builder
from occgen_hub.cli import cli
from occgen_hub.config import Config
from occgen_hub.sample import make_sample
from occgen_hub.schema import load_schema
from occgen_hub.views import Views

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

RUN = {"bash", "python"}
SHOWN = {"text", "toml", "bibtex", "yaml"}
"""Languages of code blocks: those that are run, and those that are only shown."""

SMALLER = {"--workers": "1", "--frames": "3", "--trajectories": "1"}
"""Smaller values of options, so that a page takes seconds."""


@dataclass(frozen=True)
class Block:
    """A fenced block of code; reason: why it is not run, or empty."""

    page: str
    line: int
    language: str
    code: str
    reason: str


def blocks_of(page: Path) -> Iterator[Block]:
    lines = page.read_text().splitlines()
    start: int | None = None
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if start is None:
            start = number
            continue
        above = lines[start - 1] if start else ""
        reason = re.fullmatch(r"<!-- not run: (.+) -->", above)
        yield Block(
            page.name, start + 1, lines[start][3:].split(" ")[0],
            "\n".join(lines[start + 1 : number]), reason[1] if reason else "",
        )  # fmt: skip
        start = None
    assert start is None, f"{page.name}: the block of line {start} is not closed"


BLOCKS = {page.name: list(blocks_of(page)) for page in PAGES}


def to_run(page: str) -> list[Block]:
    return [b for b in BLOCKS[page] if b.language in RUN and not b.reason]


@pytest.mark.parametrize("page", BLOCKS)
def test_blocks_have_a_known_language_and_name_existing_tests(page):
    for block in BLOCKS[page]:
        assert block.language in RUN | SHOWN, f"{page}:{block.line}: {block.language!r}"
        for named in re.findall(r"tests/\w+\.py", block.reason):
            assert (ROOT / named).is_file(), f"{page}:{block.line}: there is no {named}"


@pytest.mark.parametrize("page", [page for page in BLOCKS if to_run(page)])
def test_code_of_each_page_runs(page, recordings, hub, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    workdir = tmp_path / "desk"
    makes_its_own = any("occgen-hub sample rooms" in b.code for b in to_run(page))
    held = ("my_room",) if makes_its_own else ("my_room", "rooms", "traj_data", "rooms_occ")
    for name in held:
        shutil.copytree(recordings / name, workdir / name, copy_function=os.link)
    monkeypatch.chdir(workdir)
    namespace: dict[str, Any] = {"__name__": "page"}
    shell = Shell(workdir, hub)
    for block in to_run(page):
        place = f"{page}:{block.line}"
        try:
            if block.language == "bash":
                shell.run(block.code)
            else:
                exec(compile(block.code, place, "exec", dont_inherit=True), namespace)
        except Exception as error:
            raise AssertionError(f"{place}: {error}") from error


@dataclass(frozen=True)
class Shell:
    """Replaces a terminal: runs the commands of a block and refuses those it cannot check."""

    workdir: Path
    hub: Hub

    def run(self, code: str) -> None:
        for line in code.replace("\\\n", " ").splitlines():
            for part in line.split(" && "):
                words = shlex.split(part, comments=True)
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words.pop(0)
                if words:
                    self.command(words)

    def command(self, words: list[str]) -> None:
        name = words[0].removeprefix("./")
        if name == "occgen-hub":
            self.occgen_hub(smaller(words[1:], self.workdir))
        elif name.startswith("scripts/"):
            assert os.access(ROOT / name, os.X_OK), f"there is no script {name}"
        elif name in ("pip", "uv", "uvx"):
            check_requirement(" ".join(words))
        else:
            assert name in ("source", "cd"), f"mark the block, {words} cannot be checked"

    def occgen_hub(self, words: list[str]) -> None:
        if words[0] == "push" and "--dry-run" not in words:
            home = {"HF_HOME": str(self.workdir.parent / "home"), "HF_HUB_OFFLINE": "0"}
            done = subprocess.run(
                [sys.executable, "-m", "occgen_hub", *words],
                env=os.environ | home | {"HF_ENDPOINT": self.hub.url, "HF_TOKEN": WRITER},
                capture_output=True, text=True, check=False, timeout=240,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            return
        result = CliRunner().invoke(cli, words, catch_exceptions=False)
        assert result.exit_code == 0, f"{words}: {result.output}"


def smaller(words: list[str], workdir: Path) -> list[str]:
    """The same command with fewer frames and the intrinsics of the test's recordings."""
    values = SMALLER | {"--intrinsics": (workdir / "my_room" / "said").read_text()}
    before = ["", *words]
    return [
        values.get(option, word).replace("my-org/", "org/")  # The test's Hub knows this name.
        for option, word in zip(before, words, strict=False)
    ]


def check_requirement(command: str) -> None:
    """Check that the extras in a pip or uv command exist and that wheels have this version."""
    extras = PROJECT["optional-dependencies"]
    for named in re.findall(r"\[([\w,]+)\]", command):
        assert set(named.split(",")) <= set(extras), f"{command}: there is no such extra"
    for version in re.findall(r"occgen_hub-([\d.]+)-py3", command):
        assert version == PROJECT["version"], f"{command}: the version is {PROJECT['version']}"


@pytest.fixture(scope="module")
def recordings(tmp_path_factory) -> Path:
    """The data that pages start from. Do not change it: pages get hard links to the files."""
    import occgen_hub

    place = tmp_path_factory.mktemp("recordings")
    make_sample(place / "rooms", trajectories=2, frames=5)
    shutil.copytree(place / "rooms", place / "traj_data")
    assert not occgen_hub.build("internnav", place / "rooms", place / "rooms_occ").failures
    builder = load_builder("internnav", place / "rooms")
    episode = builder.read(next(iter(builder.episodes())))
    captures.write_plain(episode, place / "my_room")
    intrinsics = ",".join(map(str, captures.opencv_intrinsics(episode)))
    (place / "my_room" / "said").write_text(intrinsics)
    return place


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    served = Hub()
    yield served
    served.close()


def test_the_version_is_the_same_everywhere():
    version = PROJECT["version"]
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"version = {{{version}}}" in (ROOT / "docs/licence.md").read_text()
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_commands_in_the_text_have_valid_options():
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
        for code in re.findall(r"`occgen-hub ([a-z][^`]*)`", text):
            words = shlex.split(code.replace("\\|", "|"))
            command, context = cli.commands[words[0]], click.Context(cli)
            try:
                command.make_parser(context).parse_args(words[1:])
            except click.UsageError as error:
                raise AssertionError(f"{page.name}: {code}: {error.message}") from error


def test_readme_is_short_and_its_links_work():
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) < 1000
    for page in PAGES[:2]:  # MkDocs checks the links of the site.
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (ROOT / link).exists(), f"{page.name}: {link} leads nowhere"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The documentation, built as scripts/docs builds it; warnings are errors."""
    out = tmp_path_factory.mktemp("site") / "site"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", out],
        cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
        check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_site_lists_every_page_command_option_and_setting(site):
    assert {page.stem for page in PAGES[2:]} <= {page.stem for page in site.glob("*.html")}
    commands = (site / "commands.html").read_text()
    for name, command in cli.commands.items():
        assert f'id="{name}' in commands
        for parameter in command.params:
            if isinstance(parameter, click.Option) and not parameter.hidden:
                assert parameter.opts[-1] in commands
    settings = (site / "settings.html").read_text()
    for name in Config.model_fields:
        assert f"<code>{name}</code>" in settings
    python = (site / "api.html").read_text()
    import occgen_hub

    for name in occgen_hub.__all__:
        assert f".{name}" in python, f"docs/api.md: {name} is missing"


@pytest.mark.parametrize("name", ["settings", "commands"])
def test_generated_pages_are_up_to_date(name):
    """If this fails, run scripts/docs."""
    page = (ROOT / f"docs/{name}.md").read_text()
    scope = runpy.run_path(str(ROOT / "scripts/docs_reference.py"))
    assert scope["updated"](page, name) == page


def test_build_help_lists_every_source_and_engine():
    text = {option.name: option.help for option in cli.commands["build"].params}  # type: ignore[attr-defined]
    for kind, option in (("builders", "source"), ("engines", "engine")):
        names = PROJECT["entry-points"][f"occgen_hub.{kind}"]
        assert [name for name in names if not re.search(rf"\b{name}\b", text[option])] == []


def test_adding_a_source_lists_every_media_file_and_field_of_views():
    page = (ROOT / "docs/adding_a_source.md").read_text()
    rest = {"scale", "windows", "read_labels"}  # The build and the networks set these.
    for name in {field.name for field in fields(Views)} - rest:
        assert re.search(rf"^\| .*`{name}[`(]", page, re.M), f"{name} is missing"
    for name, file in load_schema("trajectory").files.items():
        assert not file.media or f'MediaFile("{name}", ' in page, f"{name} is missing"


def test_site_loads_nothing_from_other_servers(site):
    for page in site.glob("*.html"):
        loaded = re.findall(r"<(?:script|link|img)\b[^>]*>", page.read_text())
        assert not [tag for tag in loaded if re.search(r'(?:src|href)="(?:https?:)?//', tag)]


def test_figures_are_up_to_date(tmp_path):
    """If this fails, run scripts/figures.py."""
    script = ROOT / "scripts/figures.py"
    subprocess.run([sys.executable, script, tmp_path], check=True, capture_output=True)
    committed = {path.name: path.read_bytes() for path in (ROOT / "docs/figures").iterdir()}
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == committed
