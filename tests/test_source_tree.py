"""The package's folder in a checkout, found because Python was started beside it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mghf_fast
from mghf_fast.source_tree import is_bare_source_tree

# An editable installation finds the kernels of its own tree for whatever mghf_fast is imported.
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


def test_doctor_ends_without_a_traceback(checkout: Path) -> None:
    code = PRELUDE + "from mghf_fast.commands.cli import main; sys.exit(main(['doctor']))"
    ran = run(checkout, "-c", code)
    assert ran.returncode == 0 and "Traceback" not in ran.stderr
    assert "comes from a source tree" in ran.stdout + ran.stderr


def test_an_installed_package_says_nothing() -> None:
    assert not is_bare_source_tree()
