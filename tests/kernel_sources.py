"""A digest of a kernel's sources without comments, docstrings and layout."""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
Read = Callable[[str], str]
"""The text of a file by its path in the repository."""

PACKAGE = "mghf_fast.kernels"
INCLUDE = re.compile(r'^\s*#include "([^"]+)"', re.M)
COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
# Host code of the package on which a Triton kernel's result does not depend.
OUTSIDE = ("selection",)


def read(path: str) -> str:
    return (ROOT / path).read_text()


def _exists(path: str, text_of: Read) -> bool:
    try:
        text_of(path)
    except (FileNotFoundError, KeyError):
        return False
    return True


def _cuda_files(op: str, text_of: Read) -> dict[str, str]:
    """Also the source file beside a header: what the header declares is defined there."""
    found: dict[str, str] = {}
    waiting = [f"csrc/cuda/{op}.cu", f"csrc/cuda/ops/{op}.cpp"]
    while waiting:
        path = waiting.pop()
        if path in found or path.startswith("csrc/cuda/host/"):  # not part of a GPU's build
            continue
        text = found[path] = text_of(path)
        for name in INCLUDE.findall(text):
            for folder in (str(Path(path).parent), "csrc/cuda", "csrc"):
                candidate = Path(folder, name)
                clean = Path(*_without_dots(candidate.parts)).as_posix()
                if _exists(clean, text_of):
                    waiting.append(clean)
                    break
        beside = path.removesuffix(".h") + ".cu"
        if path.endswith(".h") and _exists(beside, text_of):
            waiting.append(beside)
    return {path: "".join(COMMENT.sub("", text).split()) for path, text in found.items()}


def _without_dots(parts: tuple[str, ...]) -> list[str]:
    kept: list[str] = []
    for part in parts:
        if part == "..":
            kept.pop()
        elif part != ".":
            kept.append(part)
    return kept


def _without_docstrings(text: str) -> str:
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)):
            node.body = [
                part
                for part in node.body
                if not (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant))
            ] or [ast.Pass()]
    return ast.dump(tree)


def _triton_files(op: str, text_of: Read) -> dict[str, str]:
    found: dict[str, str] = {}
    waiting = [op]
    while waiting:
        name = waiting.pop()
        path = f"kernels/{name}.py"
        if path in found or name in OUTSIDE:
            continue
        try:
            text = text_of(path)
        except (FileNotFoundError, KeyError):
            continue  # a name from the package itself
        found[path] = _without_docstrings(text)
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.ImportFrom):
                continue
            if node.module == PACKAGE:
                waiting += [alias.name for alias in node.names]
            elif (node.module or "").startswith(f"{PACKAGE}."):
                waiting.append(str(node.module).removeprefix(f"{PACKAGE}."))
    return found


def digest(backend: str, op: str, text_of: Read = read) -> str:
    """A digest of all source files of an op's kernels, 16 hexadecimal digits."""
    files = _cuda_files(op, text_of) if backend == "cuda" else _triton_files(op, text_of)
    whole = hashlib.sha256()
    for path in sorted(files):
        whole.update(f"{path}\n{files[path]}\n".encode())
    return whole.hexdigest()[:16]
