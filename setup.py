"""Builds the native kernels with CMake, if it can, and puts them into the package.

Environment variables:

MGHF_NATIVE      "auto" (default) builds them if torch, cmake, ninja and a C++ compiler are there
                 and makes a pure-Python package otherwise; "1" insists; "0" leaves them out.
MGHF_CUDA        the same for the kernels of CUDA, beside those of the CPU: "auto" builds them for a
                 torch with CUDA if there is an nvcc of the same major version.
MGHF_CUDA_HOME   the toolkit with that nvcc; default CUDA_HOME, then nvcc's on the PATH.
MGHF_CUDA_ARCHS  architectures, such as "8.0;9.0a;12.0+PTX"; default in CMakeLists.txt.

pyproject.toml has everything that does not depend on this.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import version as version_of
from pathlib import Path

from setuptools import Command, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.dist import Distribution

ROOT = Path(__file__).resolve().parent


def program(name: str) -> str | None:
    """The path of a program, also of one that pip put beside this Python."""
    return shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))


def compiler() -> str | None:
    if (named := os.environ.get("CXX", "").split()) and shutil.which(named[0]):
        return named[0]
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def missing_tools() -> list[str]:
    """The requirements of building the kernels that are missing here."""
    missing = []
    if importlib.util.find_spec("torch") is None:
        missing.append("torch in the building environment (install it, then --no-build-isolation)")
    missing += [name for name in ("cmake", "ninja") if program(name) is None]
    if compiler() is None:
        missing.append("a C++20 compiler")
    return missing


def mode_of(variable: str) -> str:
    mode = os.environ.get(variable, "auto")
    if mode not in ("0", "1", "auto"):
        sys.exit(f"environment variable {variable} is {mode!r}; allowed are '0', '1', 'auto'")
    return mode


def native_wanted() -> bool:
    mode = mode_of("MGHF_NATIVE")
    if mode == "0":
        return False
    missing = missing_tools()
    if missing and mode == "1":
        sys.exit("MGHF_NATIVE=1, but the kernels cannot be built without " + " and ".join(missing))
    # The metadata step before it asks too: warn once.
    if missing and not {"dist_info", "egg_info"} & set(sys.argv):
        text = f"warning: mghf_fast is built without native kernels; missing: {', '.join(missing)}"
        print(text, file=sys.stderr)
    return not missing


def nvcc() -> str | None:
    for variable in ("MGHF_CUDA_HOME", "CUDA_HOME"):
        if home := os.environ.get(variable):
            return shutil.which("nvcc", path=str(Path(home, "bin")))
    return shutil.which("nvcc")


def cuda_version(nvcc: str) -> str:
    """The release of a compiler, such as "13.0"."""
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+\.\d+)", text)
    if found is None:
        sys.exit(f"{nvcc} --version does not say which release it is")
    return found[1]


def cuda_of_torch() -> str | None:
    """The CUDA version of the torch in the building environment, read from one of its files because
    importing it takes seconds."""
    torch = importlib.util.find_spec("torch")
    assert torch and torch.submodule_search_locations
    text = Path(torch.submodule_search_locations[0], "version.py").read_text()
    found = re.search(r"^cuda\b.*= '([\d.]+)'", text, re.M)
    return found[1] if found else None


def wanted_nvcc() -> str | None:
    """The compiler of the CUDA kernels, if they are to be built."""
    mode = mode_of("MGHF_CUDA")
    if mode == "0":
        return None
    found = nvcc()
    if mode == "1":
        return found or sys.exit(
            "MGHF_CUDA=1, but there is no nvcc (MGHF_CUDA_HOME names a toolkit)"
        )
    if found is None or (of_torch := cuda_of_torch()) is None:
        return None
    return found if cuda_version(found).split(".")[0] == of_torch.split(".")[0] else None


def build_library(name: str, options: list[str], prefix: Path) -> None:
    """Builds the library of that name and puts it and its facts into ``prefix``."""
    cmake, ninja = program("cmake"), program("ninja")
    torch = importlib.util.find_spec("torch")
    assert cmake and ninja and torch and torch.submodule_search_locations
    work = ROOT / "build" / f"cmake-{local if name == 'cuda' else name}"
    configure = [
        cmake, "-S", str(ROOT), "-B", str(work), "-G", "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={ninja}",
        f"-DMGHF_TORCH_DIRECTORY={torch.submodule_search_locations[0]}",
        f"-DMGHF_TORCH_VERSION={version_of('torch')}",
        f"-DMGHF_WERROR={os.environ.get('MGHF_WERROR', '0')}",
        *options,
    ]  # fmt: skip
    # An earlier build is reused unless it was configured differently.
    stamp, wanted = work / "configured", "\n".join([str(compiler()), *configure])
    if not stamp.exists() or stamp.read_text() != wanted:
        configure.append("--fresh")
    stamp.unlink(missing_ok=True)
    subprocess.run(configure, check=True)
    stamp.write_text(wanted)
    subprocess.run([cmake, "--build", str(work), "--target", f"mghf_fast_{name}"], check=True)
    for component in (name, "facts"):
        install = [cmake, "--install", str(work), "--prefix", str(prefix), "--strip"]
        subprocess.run([*install, "--component", component], check=True)


class build_native(Command):
    """Configures, builds and installs the CMake project into mghf_fast/lib."""

    description = "build the native kernels"
    user_options = ()
    editable_mode = False

    def initialize_options(self) -> None:
        self.build_lib: str | None = None
        self.build_temp: str | None = None

    def finalize_options(self) -> None:
        self.set_undefined_options(
            "build", ("build_lib", "build_lib"), ("build_temp", "build_temp")
        )

    def run(self) -> None:
        target = ROOT if self.editable_mode else Path(str(self.build_lib)).resolve()
        prefix = target / "mghf_fast" / "lib"
        # Each in its own folder, because the CPU kernels do not depend on the version of CUDA.
        build_library("cpu", ["-DMGHF_CUDA=0"], prefix)
        if cuda_compiler is not None:
            options = ["-DMGHF_CUDA=1", f"-DCMAKE_CUDA_COMPILER={cuda_compiler}"]
            if archs := os.environ.get("MGHF_CUDA_ARCHS"):
                options.append(f"-DMGHF_CUDA_ARCHS={archs}")
            build_library("cuda", options, prefix)

    # setuptools requires this of a build step; the files are in place after run().
    def get_source_files(self) -> list[str]:
        return ["CMakeLists.txt", *(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*.*"))]

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class platform_wheel(bdist_wheel):
    """The kernels know the platform but neither Python nor torch's exact version: py3-none-*."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class PlatformDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return True  # installs into the platform's directory, not the pure one


release = re.search(r'^__version__ = "(.+)"', (ROOT / "mghf_fast/_version.py").read_text(), re.M)
assert release is not None
native = native_wanted()
cuda_compiler = wanted_nvcc() if native else None
local = "cpu" if cuda_compiler is None else "cu" + cuda_version(cuda_compiler).replace(".", "")
if native:
    build.sub_commands.append(("build_native", None))

setup(
    version=release[1] + (f"+{local}" if native else ""),
    packages=[*find_packages(include=["mghf_fast", "mghf_fast.*"]), "mghf_fast.kernels"],
    package_dir={"mghf_fast.kernels": "kernels"},
    cmdclass={"build_native": build_native, "bdist_wheel": platform_wheel} if native else {},
    distclass=PlatformDistribution if native else Distribution,
)
