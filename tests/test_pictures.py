"""Picture files of every kind, read by every command: demo, visualize, pretrain and evaluate accept
the same files, read the same pixels and refuse the others in one sentence."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

Image = pytest.importorskip("PIL.Image")

from mghf_fast.commands import rasters  # noqa: E402
from mghf_fast.commands.demo import photographs  # noqa: E402
from mghf_fast.commands.evaluate import pictures as evaluated  # noqa: E402
from mghf_fast.commands.pretrain import pictures as trained  # noqa: E402
from mghf_fast.commands.visualize import pictures as visualized  # noqa: E402

Reader = Callable[[Path], np.ndarray]


def in_visualize(path: Path) -> np.ndarray:
    (picture,), _ = visualized.load([path], None)
    return np.rint(picture.image.permute(1, 2, 0).numpy() * 255).astype(np.uint8)


READERS: dict[str, Reader] = {
    "demo": lambda path: np.asarray(photographs.decode(path)),
    "evaluate": lambda path: evaluated.read(path)[0],
    "pretrain": lambda path: np.asarray(trained._decoded(path.read_bytes())),
    "visualize": in_visualize,
}
RAMP = np.tile(np.linspace(0, 1, 40), (24, 1))


def written(path: Path, kind: str) -> Path:
    """A ramp of 40 x 24 in a pixel format."""
    grey = np.rint(RAMP * 255).astype(np.uint8)
    if kind == "16-bit":
        Image.fromarray((RAMP * 65535).astype(np.uint16)).save(path.with_suffix(".png"))
        return path.with_suffix(".png")
    if kind in ("16-bit TIFF", "float", "int32"):
        values = {
            "16-bit TIFF": (RAMP * 65535).astype(np.uint16),
            "float": RAMP.astype(np.float32),
            "int32": (RAMP * 1e6).astype(np.int32),
        }[kind]
        Image.fromarray(values).save(path.with_suffix(".tif"))
        return path.with_suffix(".tif")
    picture = Image.fromarray(grey)
    if kind == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(np.rot90(grey)).save(path.with_suffix(".png"), exif=exif)
        return path.with_suffix(".png")
    path = path.with_suffix(".tif" if kind == "CMYK" else ".png")
    (picture if kind == "P" else picture.convert("RGB")).convert(kind).save(path)
    return path


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["16-bit", "16-bit TIFF", "float", "int32"])
def test_more_than_8_bits_are_refused(reader: str, kind: str, tmp_path: Path) -> None:
    """A conversion to RGB would clip them: a picture of 16 bits would become white."""
    path = written(tmp_path / "picture", kind)
    with pytest.raises((ValueError, OSError), match="is not 8 bits a channel"):
        READERS[reader](path)
    with pytest.raises(ValueError, match="is not 8 bits a channel"):
        rasters.size(path)  # whose callers look for errors before they compute


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["L", "LA", "RGB", "RGBA", "P", "CMYK", "turned"])
def test_other_formats_are_the_picture_itself(reader: str, kind: str, tmp_path: Path) -> None:
    pixels = READERS[reader](written(tmp_path / "picture", kind))
    assert pixels.shape == (24, 40, 3) and pixels.dtype == np.uint8
    expected = np.rint(RAMP * 255)[..., None]
    assert np.abs(pixels - expected).max() <= (2 if kind == "CMYK" else 0)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_picture_is_refused(reader: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    with pytest.raises((ValueError, OSError), match="not readable as a picture"):
        READERS[reader](path)


@pytest.mark.parametrize("reader", READERS)
def test_a_truncated_picture_is_refused(reader: str, tmp_path: Path) -> None:
    path = written(tmp_path / "picture", "RGB")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises((ValueError, OSError), match="not readable as a picture"):
        READERS[reader](path)


@pytest.mark.parametrize("reader", ["demo", "evaluate", "visualize"])
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_not_waited_for(reader: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "picture.png")
    with pytest.raises(ValueError, match="not a regular file"):
        READERS[reader](tmp_path / "picture.png")


def test_sizes_come_from_the_header(tmp_path: Path) -> None:
    for kind in ("RGB", "turned", "CMYK"):
        path = written(tmp_path / kind, kind)
        assert rasters.size(path) == rasters.rgb(path).size == (40, 24)
    assert rasters.size(path.read_bytes()) == (40, 24)


def test_a_crop_reads_a_crop(tmp_path: Path) -> None:
    """No float copy of a large picture is made, and no second one of the whole."""
    path = tmp_path / "large.png"
    Image.fromarray(np.zeros((3000, 3000, 3), np.uint8)).save(path)
    read_float = []
    original = visualized.tensor

    def spy(picture: Image.Image) -> object:
        read_float.append(picture.size)
        return original(picture)

    visualized.tensor = spy
    try:
        visualized.load([path, path], (100, 200, 64, 48))
    finally:
        visualized.tensor = original
    assert read_float == [(64, 48)] * 2


# ---- messages, and streams that cannot show them ----


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "in.png")
    return tmp_path


def command(folder: Path, out: str, **options: object) -> subprocess.CompletedProcess[bytes]:
    words = [sys.executable, "-m", "mghf_fast", "visualize", "in.png", "--maps", "2"]
    words += ["--width", "600", "--out", out]
    return subprocess.run(words, cwd=folder, stderr=subprocess.PIPE, **options)  # type: ignore[call-overload,no-any-return]


def test_a_name_that_stdout_cannot_show_is_no_failure(picture: Path) -> None:
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    ran = command(picture, "é.png", env=env, stdout=subprocess.PIPE)
    assert ran.returncode == 0 and (picture / "é.png").exists(), ran.stderr
    assert ran.stdout == b"Written: \\xe9.png" + os.linesep.encode()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a POSIX shell")
def test_a_closed_stdout_is_no_failure(picture: Path) -> None:
    ran = command(picture, "out.png", preexec_fn=lambda: os.close(1))
    assert ran.returncode == 0 and (picture / "out.png").exists(), ran.stderr


def test_streams_of_other_kinds_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from mghf_fast.commands import cli

    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    assert cli.main(["--version"]) == 0
    assert stream.getvalue().startswith("mghf_fast ")
