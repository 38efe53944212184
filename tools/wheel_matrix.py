"""Tries wheels under several Pythons and torches, each pair in its own environment:

    python tools/wheel_matrix.py dist/*.whl --python python3.11 python3.12 --torch 2.11.0 2.13.0

Every wheel is installed away from the source tree and tried by smoke_test.py; the CPU wheel must
also pass the tests of every op and loss with its kernels. Environments are kept in build/matrix;
one with a torch for CUDA takes 5 GB.
"""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUITE = (
    *sorted(path.stem for path in (ROOT / "csrc" / "ops").glob("*.cpp")),  # every compiled op
    *("losses", "step", "hf_diff", "extractor", "native", "backends"),
)


def environment(folder: Path, python: str, torch: str) -> Path:
    """The Python of an environment with that torch."""
    version = [python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
    name = subprocess.check_output(version, text=True).strip()
    home = folder / f"python{name}-torch{torch}"
    inside = home / "bin" / "python"
    if not (home / "complete").exists():
        subprocess.check_call([python, "-m", "venv", "--clear", home])
        pip = [str(inside), "-m", "pip", "install", "--quiet"]
        subprocess.check_call([*pip, f"torch=={torch}"])
        subprocess.check_call(
            [*pip, "numpy", "pytest", "hypothesis", "pillow", "scikit-image", "scikit-learn"]
        )
        (home / "complete").touch()
    return inside


def try_wheel(wheel: Path, python: Path, folder: Path) -> str:
    """Tries a wheel; returns the result in a few words."""
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    subprocess.check_call([*pip, str(wheel)])  # with what it depends on
    subprocess.check_call([*pip, "--force-reinstall", "--no-deps", str(wheel)])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    smoke_test = ROOT / "tools" / "smoke_test.py"
    for file in [*(ROOT / "tests").glob("*.py"), smoke_test, ROOT / "pyproject.toml"]:
        shutil.copy(file, folder)
    for package in ("benchmarks", "tools"):  # which tests import; not in the wheel
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("results"))
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MGHF_", "PYTHON"))}
    run = functools.partial(
        subprocess.run,
        cwd=folder,
        env=clean,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    smoke = run([python, "smoke_test.py", *(["kernels"] if "+" in wheel.name else [])])
    last = smoke.stdout.strip().splitlines()[-1]
    if smoke.returncode != 0:
        return f"FAILED: {last}"
    if "+cpu" not in wheel.name:
        return last
    files = [f"test_{name}.py" for name in SUITE]
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", *files]
    suite = run(command)
    (folder / "log").write_text(suite.stdout)
    last = suite.stdout.strip().splitlines()[-1].strip("= ")
    return last if suite.returncode == 0 else f"FAILED: {last} ({folder / 'log'})"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python tools/wheel_matrix.py")
    parser.add_argument("wheels", type=Path, nargs="+")
    parser.add_argument("--python", nargs="+", default=[sys.executable])
    parser.add_argument("--torch", nargs="+", default=["2.13.0"])
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "matrix")
    options = parser.parse_args(arguments)
    failed = False
    for python in options.python:
        for torch in options.torch:
            inside = environment(options.folder, python, torch)
            for wheel in options.wheels:
                pair = inside.parts[-3]  # its own folder, so that two may run side by side
                outcome = try_wheel(wheel.resolve(), inside, options.folder / "run" / pair)
                failed |= outcome.startswith("FAILED")
                print(f"{pair}  {wheel.name}: {outcome}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
