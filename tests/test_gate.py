"""The slow checks run when their sources have changed, and their lists of sources are complete."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools import gate

MAKEFILE = """
PYTHON := python3
.PHONY: asan triton other
asan: build/venv
	echo asan >> log && : $(PYTHON) tests/test_one.py && test -z "$(FAILS)"
triton:
	echo triton >> log
other:
	echo other  # comment
build/venv:
	touch build/venv
"""
FILES = {
    "Makefile": MAKEFILE,
    "csrc/cpu/one.cpp": "int one;\n",
    "csrc/cuda/one.cu": "int one;\n",
    "kernels/one.py": "one = 1\n",
    "tests/test_one.py": "def test():\n    import helper\n",
    "tests/helper.py": "from bench.inner import cases\n",
    "tests/conftest.py": "",
    "bench/inner/cases.py": "from .. import more\ndef f():\n    from .. import never\n",
    "bench/more.py": "",
    "bench/never.py": "",
    "build/venv": "",
}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with two targets, which record in a file that they ran."""
    for path, text in FILES.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    (tmp_path / ".ci").mkdir()
    targets = {"asan": ("csrc/*", "!csrc/cuda/*"), "triton": ("kernels/*.py",)}
    monkeypatch.setattr(gate, "TARGETS", targets)
    monkeypatch.setattr(gate, "ONLY_WITH_ALL", ())
    monkeypatch.delenv("FAILS", raising=False)
    return tmp_path


def ran(root: Path, *arguments: str) -> list[str]:
    """The targets that ran."""
    (root / "log").write_text("")
    gate.main(arguments, root)
    return (root / "log").read_text().split()


def test_what_has_passed_is_skipped_by_name(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert ran(root) == ["asan", "triton"]
    capfd.readouterr()
    assert ran(root) == []
    out = capfd.readouterr().out
    assert "asan: skipped, nothing that it depends on has changed" in out and "triton: " in out
    assert ran(root, "--all") == ["asan", "triton"]
    assert ran(root, "--all", "triton") == ["triton"]
    assert sorted(json.loads((root / ".ci/passed.json").read_text())) == ["asan", "triton"]


@pytest.mark.parametrize(
    "path",
    ["csrc/cpu/one.cpp", "tests/test_one.py", "tests/helper.py", "tests/conftest.py",
     "bench/inner/cases.py", "bench/more.py"],
)  # fmt: skip
@pytest.mark.parametrize("gone", [False, True])
def test_a_changed_byte_and_a_vanished_file_make_it_run(root: Path, path: str, gone: bool) -> None:
    ran(root)
    if gone:
        (root / path).rename(root / "build" / "gone")
    else:
        (root / path).write_text(FILES[path] + "\n")
    before = gate.fingerprint("asan", root)
    assert gate.passed(root)["asan"] != before and gate.passed(root)["triton"] == (
        gate.fingerprint("triton", root)
    )
    if gone:
        (root / "build" / "gone").rename(root / path)
    else:
        (root / path).write_text(FILES[path])
    assert ran(root) == []


def test_a_new_file_and_another_recipe_make_it_run(root: Path) -> None:
    ran(root)
    (root / "csrc/cpu/two.h").write_text("int two;\n")
    assert ran(root) == ["asan"]
    makefile = root / "Makefile"
    makefile.write_text(MAKEFILE.replace("python3", "python3 -B"))
    assert ran(root) == ["asan"]
    makefile.write_text(makefile.read_text().replace("other", "another").replace("comment", "word"))
    assert ran(root) == []


def test_what_it_does_not_depend_on_makes_no_difference(root: Path) -> None:
    ran(root)
    for path in ("csrc/cuda/one.cu", "bench/never.py", "build/anything", "README.md"):
        (root / path).write_text("changed\n")
    assert ran(root) == []


def test_another_torch_makes_it_run(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Package:
        name, version = "torch", "2.13.0"

    def distributions(name: str) -> Iterator[type[Package]]:
        return iter([Package] if name == "torch" else [])

    monkeypatch.setattr(gate.metadata, "distributions", distributions)
    ran(root)
    monkeypatch.setattr(Package, "version", "2.13.0+cpu")
    assert ran(root) == []
    monkeypatch.setattr(Package, "version", "2.14.0+cpu")
    assert ran(root) == ["asan", "triton"]


def test_what_fails_runs_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAILS", "1")
    assert gate.main([], root) == 1
    assert sorted(gate.passed(root)) == ["triton"]
    monkeypatch.delenv("FAILS")
    assert ran(root) == ["asan"] and ran(root) == []


def test_what_changes_while_it_runs_has_not_passed(root: Path) -> None:
    (root / "Makefile").write_text(MAKEFILE.replace("echo triton", "echo 1 > kernels/one.py; echo"))
    ran(root)
    assert sorted(gate.passed(root)) == ["asan"]


def test_a_pass_is_written_down_and_serves_another_checkout(
    root: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    assert ran(root, "--passed", "asan") == []
    assert ran(root) == ["triton"]
    other = tmp_path_factory.mktemp("other") / "clone"
    root.rename(other)
    assert ran(other) == []


def test_an_unknown_target_is_refused(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gate.main(["--passed", "wheel"], root)
    assert "target is 'wheel'; allowed are asan, triton" in capsys.readouterr().err


# ---- what the repository's targets depend on ----


@functools.cache
def files_of(target: str) -> set[str]:
    return set(gate.depends_on(target))


@functools.cache
def every_file() -> set[str]:
    return gate.tree(gate.ROOT)


def below(folder: str, suffix: str = "") -> set[str]:
    return {path for path in every_file() if path.startswith(folder) and path.endswith(suffix)}


@pytest.mark.parametrize("target", gate.TARGETS)
def test_whatever_is_named_is_there(target: str) -> None:
    assert files_of(target) - every_file() == set()


def test_every_source_has_its_target() -> None:
    csrc, cuda, host = below("csrc/"), below("csrc/cuda/"), below("csrc/cuda/host/")
    cpu = below("csrc/cpu/")
    assert csrc - cuda <= files_of("asan") & files_of("wheel-check")
    assert csrc - cpu - host <= files_of("cuda")
    assert csrc - cpu <= files_of("cuda-host")
    assert below("tests/cuda_host") <= files_of("cuda-host")
    assert below("kernels/", ".py") <= files_of("triton") & files_of("triton-resources")
    assert below("mghf_fast/", ".py") <= files_of("wheel-check")
    library = below("mghf_fast/") - below("mghf_fast/commands/") - below("mghf_fast/integrations/")
    for target in ("asan", "cuda-host", "triton", "triton-resources", "wheel-check"):
        assert library <= files_of(target), target


def test_every_test_of_the_cuda_kernels_has_its_target() -> None:
    assert below("tests/test_cuda_") <= files_of("cuda-host") & files_of("cuda-host-address")


IMPORTED = """
import importlib, os, sys
for name in sys.argv[2:]:
    importlib.import_module(name)
for module in list(sys.modules.values()):
    if path := getattr(module, "__file__", None):
        print(os.path.relpath(os.path.realpath(path), sys.argv[1]))
"""


@pytest.mark.parametrize("target", ["cuda-host", "triton", "triton-resources"])
def test_what_its_tests_and_tools_import_is_among_it(target: str) -> None:
    """As a new Python process imports it."""
    scripts = re.compile(r"tests/(test_\w+|conftest)\.py|tools/[a-z]\w+\.py")
    named = [path for path in sorted(files_of(target)) if scripts.fullmatch(path)]
    names = [path[:-3].removeprefix("tests/").replace("/", ".") for path in named]
    path = [str(gate.ROOT), str(gate.ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IMPORTED, str(gate.ROOT), *names],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    loaded = set(run.stdout.split()) & every_file() - below("kernels/")
    assert loaded > {"mghf_fast/__init__.py"} and loaded - files_of(target) == set()


def test_it_needs_no_torch() -> None:
    code = "import sys; sys.path.insert(0, '.'); import tools.gate; print('torch' in sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=gate.ROOT, capture_output=True, text=True
    )
    assert run.stdout.strip() == "False"
