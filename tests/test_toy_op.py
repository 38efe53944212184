"""An op is added in the ten files that CONTRIBUTING lists: here `channel_mean`, from tests/toy_op.

A copy of the package gets them and nothing else. Its kernels are compiled for the CPU by the
project's CMakeLists.txt, the other ops left out, which takes most of the time.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mghf_fast
from mghf_fast import native

ROOT = Path(__file__).resolve().parents[1]
TOY, OP = ROOT / "tests" / "toy_op", "channel_mean"
EDITED = {
    "mghf_fast/ops/__init__.py": (
        ("from . import ", f"from . import {OP}, "),
        ("(coupling, entropy, ", f"({OP}, coupling, entropy, "),
    ),
    "mghf_fast/functional.py": (
        ('    "channel_entropy",\n', f'    "channel_entropy",\n    "{OP}",\n'),
        (
            "def gram_matrix(",
            '''def channel_mean(x: Tensor, *, backend: str | None = None) -> Tensor:
    """The mean of every feature map.

    Args:
        x: features, (B, C, H, W).

    Returns:
        (B, C), float32 (float64 for float64 input), differentiable in ``x``.
    """
    check.check_tensor("x", x, "(B, C, H, W)")
    result: Tensor = ops.channel_mean.channel_mean(x, current_backend(backend))
    return result


def gram_matrix(''',
        ),
    ),
}
"""The files that are there already, and what is replaced in each; tests/toy_op has the others."""
MOST = 10


def files() -> set[str]:
    """What adding the toy op takes."""
    made = {path.relative_to(TOY).as_posix() for path in TOY.rglob("*.*") if path.is_file()}
    return {path for path in made if "__pycache__" not in path} | EDITED.keys()


def program(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


def test_contributing_lists_these_files() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = text[text.index("## Adding an op") : text.index("### Another backend")]
    listed = re.findall(r"^\d+\. `([^`]+)`", section, re.M)
    assert len(listed) == len(set(listed)) <= MOST
    assert {path.replace("<op>", OP) for path in listed} == files()


def overlay(folder: Path) -> None:
    """Adds the toy op's files to a copy of the repository."""
    for path in files() - EDITED.keys():
        assert not (folder / path).exists(), f"{path} is there without the toy op"
        shutil.copy(TOY / path, folder / path)
    for path, replacements in EDITED.items():
        text = (folder / path).read_text()
        for before, after in replacements:
            assert text.count(before) == 1, (path, before)
            text = text.replace(before, after)
        (folder / path).write_text(text)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository with the toy op."""
    folder, package = tmp_path_factory.mktemp("checkout"), Path(mghf_fast.__file__).parent
    kernels = package / "kernels" if (package / "kernels").exists() else ROOT / "kernels"
    ignore = shutil.ignore_patterns("__pycache__", "lib", "kernels", "toy_op")
    shutil.copytree(package, folder / "mghf_fast", ignore=ignore)
    shutil.copytree(kernels, folder / "mghf_fast" / "kernels", ignore=ignore)
    for name in ("csrc", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in ("CMakeLists.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    overlay(folder)
    return folder


@pytest.fixture(scope="module")
def library(checkout: Path) -> Path:
    """The CPU library with the kernels of the toy op alone."""
    tools, torch = (
        [program("cmake"), program("ninja"), program("c++")],
        importlib.util.find_spec("torch"),
    )
    if None in tools or native.unavailable_reason() is not None:
        pytest.skip("no compiled CPU kernels here, or no cmake, ninja and C++ compiler")
    source, build = checkout / "alone", checkout / "alone" / "build"
    shutil.copytree(checkout / "csrc", source / "csrc")
    shutil.copy(checkout / "CMakeLists.txt", source)
    for path in (source / "csrc" / "ops").glob("*.cpp"):
        if path.stem != OP:
            path.unlink()
    assert torch is not None and torch.submodule_search_locations
    configure = [
        str(tools[0]), "-S", str(source), "-B", str(build), "-G", "Ninja", "-DMGHF_CUDA=0",
        f"-DCMAKE_MAKE_PROGRAM={tools[1]}", "-DMGHF_WERROR=1",
        f"-DMGHF_TORCH_DIRECTORY={torch.submodule_search_locations[0]}",
    ]  # fmt: skip
    subprocess.run(configure, check=True, capture_output=True)
    command = [str(tools[0]), "--build", str(build), "--target", "mghf_fast_cpu"]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout
    return build / "libmghf_fast_cpu.so"


def run_tests(folder: Path, *words: str, **variables: str) -> str:
    """The output of tests of the copy, which must pass."""
    path = os.pathsep.join([str(folder), str(folder / "tests")])
    hidden = ("MGHF_NATIVE_LIBRARY", "MGHF_CUDA_LIBRARY", "MGHF_CUDA_HOST", "TRITON_INTERPRET")
    env = {name: value for name, value in os.environ.items() if name not in hidden}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-rA", "-p", "no:cacheprovider", *words]
    ran = subprocess.run(
        command, cwd=folder, env=env | {"PYTHONPATH": path} | variables, capture_output=True,
        text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_it_passes_the_tests_of_an_op(checkout: Path, library: Path) -> None:
    """Values, gradients, layouts, opcheck, compilation, determinism, and refusals with reasons, on
    the reference and on the compiled kernels."""
    said = run_tests(checkout, f"tests/test_{OP}.py", MGHF_NATIVE_LIBRARY=str(library))
    for backend in ("reference", "cpu"):
        assert f"PASSED tests/test_{OP}.py::test_contract[{backend}]" in said


def test_nothing_else_must_know_of_it(checkout: Path) -> None:
    """What other tests ask of every op and of every public function holds."""
    of_all = {
        "derivatives": ("every_public_function_is_here", f"second_derivatives[{OP}]"),
        "losses": ("public_names",),
        "trials": ("every_op_with_a_gpu_kernel_has_a_problem",),
        "backends": ("the_reference_is_always_there_and_runs_everything",),
        "source_tree": ("the_build_and_the_package_have_the_same_ops",),
        "preferences": ("every_backend_is_in_order_once",),
    }
    tests = [f"tests/test_{file}.py::test_{name}" for file in of_all for name in of_all[file]]
    said = run_tests(checkout, *tests)
    assert all(f"PASSED {test}" in said for test in tests)


def test_a_fault_in_it_is_found(checkout: Path, tmp_path: Path) -> None:
    """The tests above can fail: a gradient with the wrong sign does not pass."""
    broken = tmp_path / "broken"
    shutil.copytree(checkout, broken, ignore=shutil.ignore_patterns("alone", "csrc"))
    file = broken / "mghf_fast" / "reference" / f"{OP}.py"
    file.write_text(file.read_text().replace("(grad / pixels)", "(-grad / pixels)"))
    with pytest.raises(AssertionError, match="test_gradcheck"):
        run_tests(broken, f"tests/test_{OP}.py", "-k", "gradcheck")
