"""The documentation: its links lead somewhere, and the commands that it shows are commands."""

import re
import shlex
from pathlib import Path

import pytest

from jaxspd.cli import build_parser

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for link in LINK.findall(text(page)):
        target, _, anchor = link.partition("#")
        if target.startswith("https://"):
            continue
        there = (page.parent / target).resolve() if target else page
        assert there.exists(), link
        assert not anchor or anchor in anchors(there), link


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
