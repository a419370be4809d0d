"""Lays out the site's pages in build/pages, from which `make docs` builds it: python docs/pages.py

The README is the first page, and what was measured is part of the site. Links are written as GitHub reads
them, from file to file; here they are turned towards where the files lie in the site. The notebook becomes a
page.
"""

import base64
import json
import posixpath
import re
import shutil
from dataclasses import fields
from pathlib import Path

from jaxspd.request import SamplingParams

ROOT = Path(__file__).parents[1]
OUTSIDE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "bench/NOTES.md")
KINDS = ("md", "ipynb", "css", "png", "jpg", "svg")
FIELDS = "<!-- fields of SamplingParams -->"
LINK = re.compile(r"(?<=\]\()([^)#\s:]+)(?=[)#])")


def in_site(path: str) -> str:
    """Where the site has what lies at `path` in the repository."""
    if path == "README.md":
        return "index.md"
    return re.sub(r"ipynb$", "md", path.removeprefix("docs/"))


def turned(markdown: str, path: str) -> str:
    """`markdown` of the page at `path`, whose links lead to where the site has what they mean."""

    def link(found: re.Match) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), found[0]))
        return posixpath.relpath(in_site(target), posixpath.dirname(in_site(path)) or ".")

    return LINK.sub(link, markdown)


def field_table() -> str:
    """The fields of SamplingParams, with what the command's help says of each."""
    rows = [f"| `{item.name}` | {item.metadata['help']} |" for item in fields(SamplingParams)]
    return "\n".join(["| field | what it says |", "|---|---|", *rows])


def notebook_page(notebook: Path, there: Path) -> str:
    """The page that shows `notebook`, whose pictures go beside it at `there`."""
    parts = []
    for number, cell in enumerate(json.loads(notebook.read_text(encoding="utf-8"))["cells"]):
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        for output in cell.get("outputs", ()):
            if output["output_type"] == "stream":
                parts.append(f"```text\n{''.join(output['text']).rstrip()}\n```")
            elif picture := output["data"].get("image/png"):
                name = f"{there.stem}-{number}.png"
                (there.parent / name).write_bytes(base64.b64decode("".join(picture)))
                parts.append(f"![]({name})" + "{ .plot }")
    return "\n\n".join(parts) + "\n"


def sources() -> list[str]:
    """Everything that the site shows, by its path in the repository."""
    found = [
        file.relative_to(ROOT).as_posix()
        for folder in ("docs", "bench/results")
        for kind in KINDS
        for file in (ROOT / folder).rglob(f"*.{kind}")
    ]
    return [*OUTSIDE, *sorted(found)]


def lay_out(pages: Path) -> None:
    """Writes all that the site shows to the folder `pages`, and nothing else is left there."""
    shutil.rmtree(pages, ignore_errors=True)
    for path in sources():
        there = pages / in_site(path)
        there.parent.mkdir(parents=True, exist_ok=True)
        if path.endswith(".ipynb"):
            there.write_text(notebook_page(ROOT / path, there), encoding="utf-8")
        elif path.endswith(".md"):
            page = turned((ROOT / path).read_text(encoding="utf-8"), path)
            there.write_text(page.replace(FIELDS, field_table()), encoding="utf-8")
        else:
            shutil.copyfile(ROOT / path, there)


if __name__ == "__main__":
    lay_out(ROOT / "build" / "pages")
