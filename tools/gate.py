"""Runs the slow checks whose sources changed since they last passed; `.ci/run` calls it.

    python tools/gate.py [--all] [asan ...]    runs what changed, or all; says what it skips
    python tools/gate.py --passed asan         records that a check has passed as it is now

A check is a target of the Makefile. It depends on the files in TARGETS, on the tests and tools that
its recipe names and on what these import, on the recipe, and on the versions of torch and Triton. A
digest of all that goes into `.ci/passed.json` when the check passes, and is committed, so that it
holds for a clean clone. It does not cover the system's compiler, the processor and other packages:
because of these everything runs once a week.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ("mghf_fast/*", "!mghf_fast/commands/*", "!mghf_fast/integrations/*")
BUILD, PACKAGE = ("CMakeLists.txt", "pyproject.toml"), ("setup.py", "MANIFEST.in", "LICENSE")
# benchmarks.cases finds the modules of its cases by their names.
CASES = ("benchmarks/bench_*.py",)
HOST = ("csrc/*", "!csrc/cpu/*", "tests/cuda_host*", *CASES, *BUILD, *LIBRARY)
TRITON = ("kernels/*.py", "pyproject.toml", *LIBRARY)
# Patterns of paths, in which * matches folders too; "!" removes from the matches of those before
# it.
TARGETS: Mapping[str, Sequence[str]] = {
    "asan": ("csrc/*", "!csrc/cuda/*", *BUILD, *LIBRARY),
    "cuda": ("csrc/*", "!csrc/cpu/*", "!csrc/cuda/host/*", *BUILD),
    **dict.fromkeys(("cuda-host", "cuda-host-address"), HOST),
    **dict.fromkeys(("triton", "triton-resources", "triton-resources-old"), TRITON),
    "wheel-check": ("csrc/*", "!csrc/cuda/*", "kernels/*.py", "mghf_fast/*", *BUILD, *PACKAGE),
}
ONLY_WITH_ALL = ("cuda-host-address", "triton-resources-old")
ENVIRONMENT = {"MGHF_NATIVE": "1", "MGHF_WERROR": "1"}  # of every check, whoever calls


def tree(root: Path) -> set[str]:
    """Every file that may be a source, by its path from the root."""
    found: set[str] = set()
    for folder, folders, names in os.walk(root):
        folders[:] = [d for d in folders if not re.match(r"\.|(build|lib|__pycache__)$", d)]
        found |= {Path(folder, name).relative_to(root).as_posix() for name in names}
    return found


def recipe(target: str, root: Path) -> str:
    """The commands that make would run for the target from scratch, independent of the root's
    path."""
    command = ["make", "--dry-run", "--always-make", "--no-print-directory", "VENV=.venv", target]
    text = subprocess.check_output(command, cwd=root, env=os.environ | ENVIRONMENT, text=True)
    return text.replace(str(root), "").replace(str(root).replace("/", "_"), "")


def imported(path: str, root: Path, files: set[str]) -> set[str]:
    """The files of the repository that a Python file imports; a test's also within functions."""
    found, folder, module = set(), Path(path).parent.parts, ast.parse((root / path).read_text())
    for node in ast.walk(module) if path.startswith("tests/") else module.body:
        names = [alias.name for alias in getattr(node, "names", []) if isinstance(alias, ast.alias)]
        if isinstance(node, ast.ImportFrom):
            above = folder[: len(folder) + 1 - node.level] if node.level else ()
            names = [".".join([*above, *filter(None, [node.module]), name]) for name in names]
        for parts in (name.split(".") for name in names):
            stems = [f"tests/{parts[0]}", *("/".join(parts[:end]) for end in (1, 2, 3, 4))]
            found |= {f"{stem}{end}" for stem in stems for end in (".py", "/__init__.py")}
    return found & files


def select(patterns: Sequence[str], files: set[str]) -> set[str]:
    """The files that the patterns match, and the patterns that match none."""
    found: set[str] = set()
    for pattern in patterns:
        matching = {path for path in files if fnmatchcase(path, pattern.lstrip("!"))}
        found = found - matching if pattern.startswith("!") else found | (matching or {pattern})
    return found


def depends_on(target: str, root: Path = ROOT) -> list[str]:
    """The files that the target's result depends on, and patterns whose files were removed."""
    files, text = tree(root), recipe(target, root)
    found = select(TARGETS[target], files)
    scripts = re.findall(r"\b(?:tests/test_|tools/)[\w*]+\.py", text)
    scripts += [f"{name.replace('.', '/')}.py" for name in re.findall(r"-m (tools\.\w+)", text)]
    waiting = select(["tests/conftest.py"] * ("tests/" in text) + scripts, files)
    # The library and the kernels count as a whole for the targets that have them above.
    known = select((*LIBRARY, "kernels/*"), files)
    while waiting:
        found.add(path := waiting.pop())
        waiting |= imported(path, root, files) - found - known if path in files else set()
    return sorted(found)


def fingerprint(target: str, root: Path = ROOT) -> str:
    whole = hashlib.sha256(recipe(target, root).encode())
    for package in (d for name in ("torch", "triton") for d in metadata.distributions(name=name)):
        whole.update(f"{package.name} {package.version.partition('+')[0]}\n".encode())
    for path in depends_on(target, root):
        content = (root / path).read_bytes() if (root / path).is_file() else b"missing"
        whole.update(f"{path} {hashlib.sha256(content).hexdigest()}\n".encode())
    return whole.hexdigest()[:16]


def passed(root: Path = ROOT) -> dict[str, str]:
    """Target -> the fingerprint with which it last passed."""
    path = root / ".ci" / "passed.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}


def note(target: str, root: Path = ROOT) -> None:
    known = passed(root) | {target: fingerprint(target, root)}
    (root / ".ci" / "passed.json").write_text(json.dumps(known, indent=0, sort_keys=True) + "\n")


def run(target: str, root: Path, anyway: bool) -> bool:
    """Runs the target unless it has passed with the same fingerprint; returns whether it passes."""
    before = fingerprint(target, root)
    if not anyway and passed(root).get(target) == before:
        print(f"{target}: skipped, nothing that it depends on has changed since it passed")
        return True
    print(f"{target}: runs", flush=True)
    good = subprocess.run(["make", target], cwd=root, env=os.environ | ENVIRONMENT).returncode == 0
    if good and fingerprint(target, root) == before:
        note(target, root)
    print(f"{target}: {'passed' if good else 'FAILED'}", flush=True)
    return good


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(prog="python tools/gate.py")
    parser.add_argument("--all", action="store_true", help="run what has passed before, too")
    parser.add_argument("--passed", nargs="+", default=[], metavar="TARGET", help="write it down")
    parser.add_argument("target", nargs="*", help=f"default: {', '.join(TARGETS)}")
    options = parser.parse_args(arguments)
    if unknown := {*options.target, *options.passed} - TARGETS.keys():
        parser.error(f"target is {unknown.pop()!r}; allowed are {', '.join(TARGETS)}")
    for target in options.passed:
        note(target, root)
    every = [target for target in TARGETS if options.all or target not in ONLY_WITH_ALL]
    chosen = options.target or ([] if options.passed else every)
    return sum(not run(target, root, options.all) for target in chosen)


if __name__ == "__main__":
    sys.exit(main())
