"""Pages that users read: links are valid, commands exist, and the language is plain."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from anyflow_train.__main__ import COMMANDS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "assets/tiny-wan/README.md", *DOCS.rglob("*.md")])

LINK = re.compile(r"\]\(([^)\s]+)\)")
RUN = re.compile(r"(?:anyflow|-m anyflow_train|launch/train\.sh)\s+([a-z0-9_]+)([^\n`|;]*)")
EXPERIMENT = re.compile(r"\bexperiment=(\w+)")
PART = re.compile(r"\b(model|recipe)=(\w+)")
BARE_FIGURE = re.compile(r"(?:^|[\s(\[|=~<>-])\.\d")
# Words that speak about the project instead of the user's task, or that are not plain English.
UNPLAIN = re.compile(
    r"\b(aims?|goals?|missed|nobody|somebody|beside|twins?|whatever|first teacher|at hand|within reach|"
    r"out of reach|goes on from|but for|asked for)\b",
    re.IGNORECASE,
)


def optional_commands() -> set[str]:
    """Names of the commands that packages in `integrations/` add."""
    files = (ROOT / "integrations").glob("*/pyproject.toml")
    projects = [tomllib.loads(text_of(file))["project"] for file in files]
    return {name for project in projects for name in project["entry-points"]["anyflow_train.commands"]}


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def without_code(text: str) -> str:
    """Remove code blocks and inline code."""
    return re.sub(r"`[^`\n]+`", "", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def slug(heading: str) -> str:
    """Make the anchor that both GitHub and MkDocs give a heading of plain words."""
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip())


def anchors(page: Path) -> set[str]:
    prose = re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL)
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", prose, flags=re.MULTILINE)}


def nav_pages(entries: Any) -> list[str]:
    if isinstance(entries, str):
        return [entries]
    values = entries.values() if isinstance(entries, dict) else entries
    return [page for value in values for page in nav_pages(value)]


def runs(text: str) -> list[tuple[str, str]]:
    """Find (command, arguments) of every command line; `\\` at the end of a line continues it."""
    return RUN.findall(text.replace("\\\n", " "))


pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@pages
def test_relative_links_and_images_lead_to_files_and_headings(page: Path) -> None:
    broken = []
    for link in LINK.findall(text_of(page)):
        path, _, anchor = link.partition("#")
        if "://" in link or link.startswith("mailto:"):
            continue
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: str(page.relative_to(DOCS)))
def test_pages_of_the_site_do_not_link_outside_of_docs(page: Path) -> None:
    links = [link.partition("#")[0] for link in LINK.findall(text_of(page)) if "://" not in link]
    assert not [link for link in links if link and DOCS not in (page.parent / link).resolve().parents]


def test_every_page_is_in_the_navigation_once() -> None:
    nav = nav_pages(yaml.safe_load(text_of(ROOT / "mkdocs.yml"))["nav"])
    assert sorted(nav) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


@pages
def test_every_command_and_experiment_exists(page: Path) -> None:
    """`launch/train.sh` takes a strategy where `anyflow` takes a command; both are followed by the same overrides."""
    folders = ("experiment", "stage")
    experiments = {path.stem for folder in folders for path in (ROOT / "configs" / folder).rglob("*.yaml")}
    strategies = {path.stem for path in (ROOT / "launch").glob("*.yaml")}
    names = {*COMMANDS, *optional_commands(), *strategies}
    for command, arguments in runs(text_of(page)):
        assert command in names, f"there is no command {command!r}"
        for name in EXPERIMENT.findall(arguments):
            assert name in experiments, f"there is no experiment {name!r}"
        for group, choice in PART.findall(arguments) if EXPERIMENT.search(arguments) else ():
            assert (ROOT / "configs" / group / f"{choice}.yaml").exists(), f"there is no {group}={choice}"


@pages
def test_lists_are_quoted_so_that_zsh_takes_them_too(page: Path) -> None:
    for _, arguments in runs(text_of(page)):
        assert not re.search(r"(?:^|\s)[\w./]+=\[", arguments), arguments


@pages
def test_figures_have_a_leading_zero(page: Path) -> None:
    assert not BARE_FIGURE.findall(text_of(page))


@pages
def test_the_language_is_plain(page: Path) -> None:
    assert not UNPLAIN.findall(without_code(text_of(page)))


@pages
def test_formulas_are_in_the_syntax_that_the_site_renders(page: Path) -> None:
    prose = without_code(text_of(page))
    assert prose.count("$") % 2 == 0
    assert "\\(" not in prose
    assert "\\[" not in prose
