"""The directions of imports, and the package imported from a checkout that is not installed."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mghf_fast
from mghf_fast.ops import OPS
from mghf_fast.source_tree import is_bare_source_tree

ROOT = Path(__file__).parents[1]

# An editable installation provides its own tree's kernels to any mghf_fast that is imported.
PRELUDE = (
    "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]"
    "\n"
)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkout")
    source = Path(mghf_fast.__file__).parent
    left_out = shutil.ignore_patterns("kernels", "lib", "__pycache__")
    shutil.copytree(source, folder / "mghf_fast", ignore=left_out)
    return folder


def run(folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    hidden = ("PYTHONSAFEPATH", "PYTHONPATH", "MGHF_NATIVE_LIBRARY", "MGHF_CUDA_LIBRARY")
    env = {name: value for name, value in os.environ.items() if name not in hidden}
    return subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={**env, **variables},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("interpreted", ["0", "1"])
def test_it_works_and_says_what_it_lacks(checkout: Path, interpreted: str) -> None:
    code = PRELUDE + "import mghf_fast, torch; x = torch.rand(2, 1, 3, 48, 48)\n"
    code += "print(mghf_fast.__file__, *mghf_fast.available_backends(), mghf_fast.MGHFLoss()(*x))"
    ran = run(checkout, "-c", code, TRITON_INTERPRET=interpreted)
    assert ran.returncode == 0, ran.stderr
    assert str(checkout) in ran.stdout and "reference" in ran.stdout
    assert "cpu" not in ran.stdout.split() and "triton" not in ran.stdout.split()
    assert "comes from a source tree" in ran.stderr and "pip install -e ." in ran.stderr


def test_another_checkout_that_is_installed_in_place_is_not_taken_for_it(checkout: Path) -> None:
    ran = run(checkout, "-c", "import mghf_fast; print(*mghf_fast.available_backends())")
    assert ran.stdout.split() == ["reference"], ran.stderr
    assert "comes from a source tree" in ran.stderr


def test_a_checkout_that_is_not_installed_has_no_triton_kernels(checkout: Path) -> None:
    """Every request for kernels says how to get them."""
    code = PRELUDE + "from mghf_fast.ops import OPS; OPS['gram'].implementation('triton')"
    ran = run(checkout, "-c", code)
    assert "ImportError: mghf_fast comes from a source tree" in ran.stderr


def test_doctor_ends_without_a_traceback(checkout: Path) -> None:
    code = PRELUDE + "from mghf_fast.commands.cli import main; sys.exit(main(['doctor']))"
    ran = run(checkout, "-c", code)
    assert ran.returncode == 0 and "Traceback" not in ran.stderr
    assert "comes from a source tree" in ran.stdout + ran.stderr


def test_an_installed_package_says_nothing() -> None:
    assert not is_bare_source_tree()


# ---- imports run one way ----

PACKAGE = Path(mghf_fast.__file__).parent
MEASURED = {"commands/table5/workloads.py"}
"""Files that measure the reference as a variant, and so import it."""


def imports(file: Path) -> Iterator[str]:
    """The full names of all modules, and of the names out of them, that a file of the package
    imports, wherever in it."""
    package = ("mghf_fast", *file.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*above, *filter(None, [node.module])))
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def importers(name: str) -> set[str]:
    """The files of the package that import a module, or names from it."""
    return {
        file.relative_to(PACKAGE).as_posix()
        for file in PACKAGE.rglob("*.py")
        if any(f"{found}.".startswith(f"{name}.") for found in imports(file))
    }


def test_nothing_above_the_ops_imports_the_reference() -> None:
    found = importers("mghf_fast.reference")
    assert any(file.startswith("ops/") for file in found)  # the test does find such imports
    assert {f for f in found if not f.startswith(("ops/", "reference/"))} == MEASURED


def test_the_vocabulary_and_the_reference_need_no_backend() -> None:
    assert not [name for name in imports(PACKAGE / "ops/vocabulary.py") if "mghf_fast" in name]
    rooms = ("backends", "ops.vocabulary", "precision", "reference")
    allowed = tuple(f"mghf_fast.{room}" for room in rooms)
    for file in (PACKAGE / "reference").glob("*.py"):
        ours = [name for name in imports(file) if name.startswith("mghf_fast")]
        assert all(name.startswith(allowed) for name in ours), (file.name, ours)


def test_the_host_code_of_the_triton_kernels_has_types() -> None:
    """mypy checks what is annotated; the kernels themselves have no Python types."""
    for file in (Path(__file__).parents[1] / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.FunctionDef) or any(
                "jit" in ast.unparse(decorator) for decorator in node.decorator_list
            ):
                continue
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            untyped = [
                a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")
            ]
            assert node.returns is not None and not untyped, (file.name, node.name, untyped)


def test_the_build_and_the_package_have_the_same_ops() -> None:
    """CMake and the Makefile take an op for compiled if it has a file in these folders."""
    for folder, backends in (("ops", "cpu cuda"), ("cpu/ops", "cpu"), ("cuda/ops", "cuda")):
        there = {path.stem for path in (ROOT / "csrc" / folder).glob("*.cpp")}
        compiled = {name for name, op in OPS.items() if {*backends.split()} & {*op.backends}}
        assert there - {"cpu_capability"} == compiled, folder
    assert all(op.backends[-1] == "reference" for op in OPS.values())
    assert "cuda" in OPS["dec"].backends and "cuda" in OPS["gram"].backends
