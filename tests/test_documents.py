"""The documents: links lead somewhere, and README links every page and stays short."""

from __future__ import annotations

import re
from pathlib import Path

import pages
import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")]
)
CODE = re.compile(r"^( *)```.*?^\1```", re.M | re.S)
LINK = re.compile(r"\]\(([^)\s]+)\)|\b(?:src|href)=\"([^\"]+)\"")


def links(text: str) -> list[str]:
    """The targets of a page's links and pictures, code blocks left out."""
    return ["".join(match) for match in LINK.findall(CODE.sub("", text))]


def anchors(text: str) -> set[str]:
    """What `#...` can name in a page: its headings as GitHub writes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", CODE.sub("", text), re.M):
        words = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        repeats = (f"{words}-{n}" for n in range(1, 100))
        found.add(words if words not in found else next(w for w in repeats if w not in found))
    return found


def dead_links(page: str, root: Path = ROOT) -> list[str]:
    """The links of a page that lead to no file of the repository or to no heading of it."""
    dead = []
    for link in links((root / page).read_text()):
        if re.match(r"[a-z]+:", link):  # outside of the repository
            continue
        name, _, anchor = link.partition("#")
        target = (root / page).parent / name if name else root / page
        inside = target.resolve().is_relative_to(root.resolve())
        headed = not anchor or (target.is_file() and anchor in anchors(target.read_text()))
        if not (inside and target.exists() and headed):
            dead.append(link)
    return dead


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    assert dead_links(page) == []


def test_a_dead_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text("# One `word`, and more\n\n# Twice\n\n# Twice\n")
    (tmp_path / "page.md").write_text(
        "[a](docs/a.md) [b](docs/b.md) [c](docs/a.md#one-word-and-more) [d](docs/a.md#twice-1)\n"
        '[e](docs/a.md#no) [f](#no) [g](../h.md) [h](https://example.org) <img src="no.png">\n'
        "```\n[in code](nowhere)\n```\n"
    )
    assert dead_links("page.md", tmp_path) == [
        "docs/b.md", "docs/a.md#no", "#no", "../h.md", "no.png",
    ]  # fmt: skip


def test_readme_links_every_page_and_is_short() -> None:
    text = (ROOT / "README.md").read_text()
    assert {page for page in PAGES if page.startswith("docs/")} <= set(links(text))
    assert {"CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/NOTES.md"} <= set(links(text))
    assert len(text.splitlines()) <= 150


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/building.md"])
def test_the_targets_of_make_that_a_page_names_exist(page: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.M))
    text = (ROOT / page).read_text()
    named = set(re.findall(r"(?:^ *|`)make ([a-z][a-z-]*)", text, re.M))
    assert named and named <= targets, named - targets


# ---- the code on the pages ----

RUN = {"README.md": 1, "docs/losses.md": 1}
"""Pages whose Python runs here, and how many blocks have it."""
ELSEWHERE = {"docs/integrations.md"}
"""Pages with a test of their own for every block: test_integrations_page.py."""


def python_on(page: str) -> list[str]:
    blocks = pages.blocks(page).items()
    return [code for name, code in blocks if re.search(r": python( \d+)?$", name)]


@pytest.mark.parametrize("page", RUN)
def test_the_python_on_a_page_runs(page: str) -> None:
    code = python_on(page)
    assert len(code) == RUN[page]
    for block in code:
        pages.python_runs(block)


def test_no_page_has_python_that_nothing_runs() -> None:
    assert {page for page in PAGES if python_on(page)} == RUN.keys() | ELSEWHERE


def test_blocks_are_found_by_heading_and_language() -> None:
    text = """
```
a
```
# One

```python
# no heading
b
```
* in a list

  ```yaml
    c:
    d
  ```

## Two
```python
e
```
```python
f
```
"""
    assert pages.blocks_of(text) == {
        "top: plain": "a\n",
        "One: python": "# no heading\nb\n",
        "One: yaml": "  c:\n  d\n",
        "Two: python": "e\n",
        "Two: python 2": "f\n",
    }
