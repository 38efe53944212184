"""The audit of wheels: names, sizes, allowed dependencies of a library."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import pytest

from mghf_fast import native
from tools import audit_wheels

LIBRARY = native.cpu_library()
CPU, CUDA, PURE = (
    f"mghf_fast-0.1.0{tag}.whl"
    for tag in ("+cpu-py3-none-manylinux_2_34_x86_64", "+cu130-py3-none-manylinux_2_34_x86_64",
                "-py3-none-any")
)  # fmt: skip
needs_library = pytest.mark.skipif(
    not LIBRARY.exists() or shutil.which("readelf") is None, reason="no library to look at"
)


def problems(folder: Path, name: str, files: dict[str, bytes]) -> list[str]:
    path = folder / name
    with zipfile.ZipFile(path, "w") as wheel:
        for file, content in files.items():
            wheel.writestr(f"mghf_fast/{file}", content)
    return audit_wheels.problems_of_wheel(path, folder / "unpacked")


def build_json(cuda: str | None) -> bytes:
    return json.dumps({"cuda": cuda and {"version": cuda}}).encode()


def test_names(tmp_path: Path) -> None:
    for name in ("mghf_fast-0.1.0+cpu-py3-none-linux_x86_64.whl", "mghf_fast-0.1.0.zip"):
        assert "is not named as a wheel" in problems(tmp_path, name, {})[0]
    assert problems(tmp_path, PURE.replace("any", "manylinux_2_34_x86_64"), {}) == [
        "is for manylinux_2_34_x86_64, and has no kernels"
    ]


def test_a_pure_wheel_has_no_libraries(tmp_path: Path) -> None:
    assert problems(tmp_path, PURE, {"__init__.py": b""}) == []
    (found,) = problems(tmp_path, PURE, {"lib/libmghf_fast_cpu.so": b""})
    assert found.startswith("has the libraries ['libmghf_fast_cpu.so'], not []")


def test_size(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, PURE, {"data": bytes(audit_wheels.MOST_BYTES)})
    assert found.startswith("has 104")


@needs_library
def test_the_library_of_the_cpu(tmp_path: Path) -> None:
    files = {"lib/libmghf_fast_cpu.so": LIBRARY.read_bytes(), "lib/build.json": build_json(None)}
    assert problems(tmp_path, CPU, files) == []
    (found,) = problems(tmp_path, CUDA, files)
    assert "not ['libmghf_fast_cpu.so', 'libmghf_fast_cuda.so']" in found


@needs_library
def test_the_version_inside_is_that_of_the_name(tmp_path: Path) -> None:
    files = {"lib/libmghf_fast_cpu.so": LIBRARY.read_bytes(), "lib/build.json": build_json("13.0")}
    assert problems(tmp_path, CPU, files) == ["was built for cu130"]


@needs_library
def test_what_a_library_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    def pretend(*command: str) -> str:
        if command[0] == "readelf":
            return " 0x1 (NEEDED) Shared library: [libtorch_cpu.so]\n (NEEDED) [libc10.so]"
        return "  U aoti_torch_get_dim\n  U c10::Error::what() const"

    monkeypatch.setattr(audit_wheels, "output", pretend)
    assert audit_wheels.problems_of_library(LIBRARY) == [
        "needs libc10.so",
        "uses c10::Error::what() const",
    ]
