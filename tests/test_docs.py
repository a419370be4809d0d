"""The documentation: its links lead somewhere, and the commands that it shows are commands."""

import pkgutil
import re
import runpy
import shlex
from pathlib import Path

import pytest
import yaml

from jaxspd.cli import build_parser

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def text(page):
    return page.read_text(encoding="utf-8")


def anchors(page):
    """What links may name in `page`: its headings, as GitHub and MkDocs spell them."""
    titles = re.findall(r"^#+ (.*)$", text(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}


def commands(page):
    """The `jaxspd` commands that `page` shows, as lists of arguments."""
    shells = [block for language, block in FENCE.findall(text(page)) if language in ("", "sh", "bash")]
    # Shell arithmetic becomes a number.
    for line in re.sub(r"\$\(\(.*?\)\)", "1", "".join(shells).replace("\\\n", " ")).splitlines():
        before, found, shown = line.partition("jaxspd ")
        if found and re.fullmatch(r"\s*(\$ |[A-Z_]+=\S+\s+)*", before):
            yield shlex.split(shown.rstrip("& "), comments=True)


def links(page):
    """How many links `page` has to files and headings, all of which are there."""
    inside = [link for link in LINK.findall(text(page)) if not link.startswith("https://")]
    for link in inside:
        target, _, anchor = link.partition("#")
        there = page.parent / target if target else page
        assert there.exists(), link
        assert not anchor or anchor in anchors(there), link
    return len(inside)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    links(page)


def test_the_commands_shown_are_commands():
    shown = [command for page in PAGES for command in commands(page)]
    assert len(shown) > 15
    for command in shown:
        assert callable(build_parser().parse_args(command).run), command


def test_the_readme_is_short_and_names_what_ci_runs():
    readme = text(ROOT / "README.md")
    assert len(readme.split()) < 900
    assert "\nmake test\n" in readme
    assert "\nmake test\n" in text(ROOT / ".ci" / "run")


def test_every_page_is_in_the_sites_navigation():
    entries = yaml.safe_load(text(ROOT / "mkdocs.yml"))["nav"]
    listed = set(re.findall(r"[\w/-]+\.md", str(entries)))
    own = {page.relative_to(ROOT).as_posix().removeprefix("docs/") for page in PAGES[1:]}
    assert listed == own | {"index.md", "notebook.md", "bench/NOTES.md"}


def test_the_sites_pages_find_each_other(tmp_path):
    """As `make docs` lays them out, before MkDocs makes them HTML."""
    runpy.run_path(str(ROOT / "docs" / "pages.py"))["lay_out"](tmp_path)
    assert sum(links(page) for page in tmp_path.rglob("*.md")) > 60


def test_the_api_page_names_what_there_is():
    """With its members, of which MkDocs leaves out without a word what is not there."""
    blocks = text(ROOT / "docs" / "api.md").split("\n::: ")[1:]
    assert len(blocks) > 10
    for block in blocks:
        named = pkgutil.resolve_name(block.splitlines()[0])
        for members in re.findall(r"members: \[(.*)\]", block):
            for member in members.split(", "):
                assert getattr(named, member).__doc__, (named, member)
