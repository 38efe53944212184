"""Pictures as training data: folders of classes, shards, crops, and what cannot be read."""

from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest

from mghf_fast.commands import cli
from mghf_fast.commands.pretrain.items import Source
from mghf_fast.commands.pretrain.settings import PretrainError, Settings
from mghf_fast.commands.pretrain.sources import open_source

Image = pytest.importorskip("PIL.Image")

from mghf_fast.commands.pretrain import pictures  # noqa: E402

SMALL = "--size 16 --batch 4 --channels 4 --stages 4 --held-out 4 --workers 0"


def encoded(pixels: np.ndarray, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


def picture(label: int, number: int, side: int = 24) -> bytes:
    """Dark pictures of class 0, bright ones of class 1, each of one level."""
    level = 40 + 140 * label + number
    return encoded(np.full((side, side + number % 3, 3), level, dtype=np.uint8))


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    for label, name in enumerate(("ash", "birch")):
        (root / name / "deeper").mkdir(parents=True)
        for number in range(10):
            inner = "deeper" if number % 2 else "."
            (root / name / inner / f"{number}.png").write_bytes(picture(label, number))
        (root / name / "notes.txt").write_text("no picture")
    return root


def add(shard: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    shard.addfile(member, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{part}.tar" for part in range(2)]
    for part, path in enumerate(paths):
        with tarfile.open(path, "w") as shard:
            for number in range(part, 20, 2):
                label, key = number % 2 if part else (number // 2) % 2, f"dir.v1/{number:03}"
                add(shard, f"{key}.png", picture(label, number // 2))
                add(shard, f"{key}.cls", b"%d\n" % label)
                add(shard, f"{key}.json", b"{}")
    return paths


def source(*data: object, **settings: object) -> Source:
    values = {"size": 16, "batch": 4, "held_out": 4} | settings
    return open_source(Settings(data=tuple(map(str, data)), **values))  # type: ignore[arg-type]


def is_bright(pixels: np.ndarray) -> bool:
    return bool(pixels.mean() > 120)


def test_folders_are_classes(folders: Path) -> None:
    found = source(folders)
    assert found.classes == ("ash", "birch")
    assert found.held_out_images == 4 and found.epoch_images == 16
    for position in range(40):
        item = found.training(position)
        assert item.pixels.shape == (16, 16, 3) and item.pixels.dtype == np.uint8
        assert is_bright(item.pixels) == bool(item.label) and item.skipped == ()


def test_shards_are_read_in_place(shards: list[Path]) -> None:
    found = source(*shards)
    assert found.classes == ("0", "1")
    for position in range(20):
        item = found.training(position)
        assert is_bright(item.pixels) == bool(item.label)


def test_an_epoch_has_every_training_picture_once(folders: Path) -> None:
    found = source(folders)
    plain = [pictures.crop(picture(c, n), 16, None)[0, 0, 0] for c in range(2) for n in range(10)]
    assert len(set(plain)) == 20
    seen = []
    read = found._reader.read  # type: ignore[attr-defined]
    found._reader.read = lambda file: (seen.append(file), read(file))[1]  # type: ignore[attr-defined]
    for position in range(32):
        found.training(position)
    first, second = seen[:16], seen[16:]
    held_out = set(found._held_out.tolist())  # type: ignore[attr-defined]
    assert set(first) == set(second) == set(range(20)) - held_out
    assert first != second


def test_a_position_gives_the_same_crop_everywhere(folders: Path) -> None:
    one, other = source(folders), pickle.loads(pickle.dumps(source(folders)))
    for position in (0, 17, 400):
        assert np.array_equal(one.training(position).pixels, other.training(position).pixels)
    assert not np.array_equal(one.training(5).pixels, source(folders, seed=1).training(5).pixels)


def test_crops_keep_detail() -> None:
    rng = np.random.default_rng(0)
    big = np.zeros((96, 200, 3), dtype=np.uint8)
    big[:, 100:] = 255
    for _ in range(20):
        cut = pictures.crop(encoded(big), 16, rng)
        assert cut.shape == (16, 16, 3)
    middle = pictures.crop(encoded(big), 16, None)
    assert middle[:, :7].max() < 10 and middle[:, 9:].min() > 245
    exact = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    assert np.array_equal(pictures.crop(encoded(exact), 16, None), exact)
    assert pictures.crop(encoded(exact[:5, :9]), 16, rng).shape == (16, 16, 3)
    grey = encoded(exact[..., 0])
    assert pictures.crop(grey, 16, None).shape == (16, 16, 3)


def train(out: Path, data: list[object], *more: str, steps: int = 4) -> int:
    words = ["pretrain", *SMALL.split(), "--steps", str(steps), "--out", str(out)]
    return cli.main([*words, *more, "--data", *map(str, data)])


def told(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.splitlines()[-1]


def test_two_classes_are_learned_from_folders_and_from_shards(
    folders: Path, shards: list[Path], tmp_path: Path
) -> None:
    import json

    for name, data in (("folders", [folders]), ("shards", shards)):
        out = tmp_path / name
        assert train(out, list(data), "--lr", "0.02", steps=40) == 0
        card = json.loads((out / "extractor.json").read_text())
        assert card["held_out_accuracy"] == 1 and card["unreadable"] == 0
        assert card["configuration"]["data, source"] == name


def spoil(folders: Path, number: int) -> list[str]:
    """Truncates, empties or replaces pictures; returns their names."""
    names = sorted(str(p.relative_to(folders)) for p in folders.rglob("*.png"))[:number]
    for place, name in enumerate(names):
        content = (folders / name).read_bytes()
        broken = (content[: len(content) // 2], b"", b"not a picture")[place % 3]
        (folders / name).write_bytes(broken)
    return names


def test_unreadable_pictures_are_skipped_and_counted(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import json

    names = spoil(folders, 3)
    found = source(folders)
    items = [found.training(p) for p in range(found.epoch_images)]
    items += [found.held_out(i) for i in range(found.held_out_images)]
    assert {name for item in items for name in item.skipped} == set(names)
    assert all(is_bright(item.pixels) == bool(item.label) for item in items)

    assert train(tmp_path / "out", [folders], "--skip-limit", "3", steps=8) == 0
    assert json.loads((tmp_path / "out" / "extractor.json").read_text())["unreadable"] == 3
    assert train(tmp_path / "few", [folders], "--skip-limit", "2", steps=8) == 2
    assert "more pictures than --skip-limit 2 cannot be read, such as ash/" in told(capsys)


def test_pictures_that_are_all_unreadable_end_it(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(folders, 20)
    assert train(tmp_path / "out", [folders]) == 2
    assert "pictures in a row can be read" in told(capsys)
    assert train(tmp_path / "few", [folders], "--skip-limit", "5") == 2
    assert "more pictures than --skip-limit 5 cannot be read" in told(capsys)


def test_skipped_pictures_are_remembered_by_a_checkpoint(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(folders, 3)
    assert train(tmp_path / "out", [folders], steps=8) == 0
    for path in folders.rglob("*.png"):
        assert path.exists()
    # No more files are unreadable than before, but more than are now allowed.
    code = train(tmp_path / "out", [folders], "--resume", "--skip-limit", "2", steps=9)
    assert code == 2 and "more pictures than --skip-limit 2" in told(capsys)


def test_a_checkpoint_knows_its_data(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert train(out, [folders], steps=2) == 0
    (folders / "ash" / "0.png").write_bytes(picture(0, 0, 30))
    assert train(out, [folders], "--resume", steps=4) == 2
    assert "another configuration: data, digest is" in told(capsys)


def test_bad_folders(folders: Path) -> None:
    (folders / "cedar").mkdir()
    with pytest.raises(PretrainError, match="the class folder 'cedar' has no pictures"):
        source(folders)
    with pytest.raises(PretrainError, match="has 1 folders; each class needs one"):
        source(folders / "ash")
    with pytest.raises(PretrainError, match="allowed are 'procedural', one directory"):
        source(folders, folders)
    (folders / "cedar").rmdir()
    with pytest.raises(PretrainError, match="20 pictures, which is too few"):
        source(folders, batch=17)


def test_bad_shards(shards: list[Path], tmp_path: Path) -> None:
    def refused(path: Path, why: str) -> None:
        with pytest.raises(PretrainError, match=why):
            source(path)

    whole = shards[0].read_bytes()
    cut = tmp_path / "cut.tar"
    cut.write_bytes(whole[:700])
    refused(cut, "cut.tar is not a whole")
    cut.write_bytes(b"text" * 200)
    refused(cut, "cut.tar is not a whole, uncompressed tar file")
    packed = tmp_path / "packed.tar"
    with tarfile.open(packed, "w:gz") as shard:
        add(shard, "0.png", picture(0, 0))
    refused(packed, "not a whole, uncompressed tar file")
    refused(tmp_path / "absent.tar", "absent.tar cannot be read: No such file")

    def shard_of(*members: tuple[str, bytes]) -> Path:
        path = tmp_path / "made.tar"
        with tarfile.open(path, "w") as shard:
            for name, content in members:
                add(shard, name, content)
        return path

    png = picture(0, 0)
    refused(shard_of(("a.png", png)), "a.png has no label a.cls")
    refused(shard_of(("a.png", png), ("a.cls", b"oak")), "the label a.cls is b'oak'")
    refused(shard_of(("a.png", png), ("a.cls", b"-1")), "the label a.cls is -1")
    refused(shard_of(("a.png", png), ("a.cls", b"0")), "1 classes in the shards")
    gap = [(f"{n}.{s}", c) for n in (0, 2) for s, c in (("png", png), ("cls", b"%d" % n))]
    refused(shard_of(*gap), "class 1 has no pictures, though there are labels up to 2")
