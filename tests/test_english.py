"""Comments, docstrings and pages in plain English: rules that a program can check."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("mghf_fast", "tests", "examples", "kernels", "csrc", "benchmarks", "tools", "docs", ".")
"""The folders with sources; ``.`` is for files at the top and in all other folders."""
CPP = {".cpp", ".cu", ".cuh", ".h"}
BANNED = ("anew", "drawn into", "for want of", "is no more", "what came of it")
"""Archaic or invented words. Instead: again or recomputed; folded; because; removed; the result."""

Passage = tuple[int, str]
"""The line of a comment, docstring or paragraph, and its text."""


def joined(lines: list[Passage]) -> list[Passage]:
    """Comments on consecutive lines as one comment."""
    blocks: list[Passage] = []
    last = 0
    for number, text in lines:
        if blocks and number == last + 1:
            blocks[-1] = (blocks[-1][0], f"{blocks[-1][1]} {text}")
        else:
            blocks.append((number, text))
        last = number
    return blocks


def in_python(text: str) -> list[Passage]:
    lines = text.split("\n")
    docstrings = [
        (node.lineno, node.value.value)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    ]
    own, trailing = [], []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            alone = lines[token.start[0] - 1].lstrip().startswith("#")
            found = (token.start[0], token.string.lstrip("#:! "))
            (own if alone else trailing).append(found)
    return docstrings + joined(own) + trailing


def in_cpp(text: str) -> list[Passage]:
    own, others = [], []
    for found in re.finditer(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/\*.*?\*/', text, re.S):
        number = text.count("\n", 0, found.start()) + 1
        comment = found[0].strip("/*! \n")
        if found[0].startswith('"'):
            continue
        before = text[text.rfind("\n", 0, found.start()) + 1 : found.start()]
        alone = found[0].startswith("//") and not before.strip()
        (own if alone else others).append((number, comment))
    return joined(own) + others


def in_markdown(text: str) -> list[Passage]:
    """Paragraphs and list items, without code."""
    blocks: list[Passage] = []
    code = within = False
    for number, line in enumerate(text.split("\n"), 1):
        if line.lstrip().startswith("```"):
            code, within = not code, False
            continue
        item = re.match(r"\s*(?:[-*+]|\d+\.|#+|\|)\s+(.*)", line)
        if code or not line.strip():
            within = False
        elif item or not within:
            blocks.append((number, item[1] if item else line.strip()))
            within = True
        else:
            blocks[-1] = (blocks[-1][0], f"{blocks[-1][1]} {line.strip()}")
    return [(number, re.sub(r"`[^`]*`", "", block)) for number, block in blocks]


def passages(path: Path) -> list[Passage]:
    text = path.read_text()
    if path.suffix == ".py":
        return in_python(text)
    return in_cpp(text) if path.suffix in CPP else in_markdown(text)


def complaints(text: str) -> Iterator[str]:
    """What is wrong with a passage, in words."""
    flat = " ".join(text.split())
    if flat.startswith("Of "):
        yield f"begins with 'Of': {flat[:60]!r}"
    for words in BANNED:
        # An identifier or a quotation in backticks may be called anything.
        if re.search(rf"(?<![`\w]){words}(?![`\w(])", flat, re.I):
            yield f"says {words!r}"


def sources() -> list[str]:
    """The repository's files, new ones too; without git, those on the disk."""
    suffixes = {".py", ".md"} | CPP
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("this is no checkout of git's, in which the sources are listed")
    paths = found.stdout.splitlines()
    return sorted(p for p in paths if Path(p).suffix in suffixes and (ROOT / p).is_file())


@pytest.mark.parametrize("folder", FOLDERS)
def test_comments_docstrings_and_pages_are_plain(folder: str) -> None:
    named = {path: path.split("/")[0] for path in sources()}
    chosen = [path for path, top in named.items() if (top if top in FOLDERS else ".") == folder]
    assert chosen
    found = [
        f"{path}:{number} {complaint}"
        for path in chosen
        for number, text in passages(ROOT / path)
        for complaint in complaints(text)
    ]
    assert not found, "\n" + "\n".join(found)


def test_the_rules_find_what_they_forbid(tmp_path: Path) -> None:
    texts = {
        "a.py": '"""Of a map."""\nx = 1\n"""Of\nit."""\n# Made\n# anew.\ny = "Of anew"  # Of y\n',
        "a.cpp": '// Of a\n// row.\nint a;  // b\n/* Of what\ncame of it */\nauto s = "// Of";\n',
        "a.md": "# Of a\n\nOf these\nall.\n\n- fine, `anew`\n\n```\nOf code\n```\n",
        "b.py": '"""A map.\n\nOf the ops two have `anew()`."""\n# A map\n# Of the earth.\n',
    }  # fmt: skip
    found = {}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        all_passages = passages(tmp_path / name)
        found[name] = sorted(line for line, passage in all_passages for _ in complaints(passage))
    assert found == {"a.py": [1, 3, 5, 7], "a.cpp": [1, 4, 4], "a.md": [1, 3], "b.py": []}
