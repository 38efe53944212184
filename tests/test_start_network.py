"""``python -m benchmarks.studies.start_network``: stopped runs resume, and files are complete."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("skimage")
pytest.importorskip("tqdm")
Image = pytest.importorskip("PIL.Image")

from benchmarks.studies import start_network  # noqa: E402
from mghf_fast.commands.demo.network import CompactEDSR  # noqa: E402


@pytest.fixture
def album(tmp_path: Path) -> Path:
    folder = tmp_path / "album"
    folder.mkdir()
    for seed in range(2):
        pixels = np.random.default_rng(seed).integers(0, 256, (96, 100, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{seed}.png")
    (folder / "broken.png").write_bytes(b"nothing")
    return folder


@pytest.fixture(autouse=True)
def short_and_restored(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setattr(start_network, "CHECKPOINT_EVERY", 2)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def main(album: Path, out: Path, *more: str) -> None:
    sizes = ["--steps", "5", "--batch", "1", "--patch", "56"]
    start_network.main(["--images", str(album), "--out", str(out), *sizes, *more])


def test_a_stopped_run_ends_as_one_that_was_not(
    album: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    main(album, whole)
    shown = capsys.readouterr().out
    assert "broken.png is left out" in shown and "step 5/5" in shown

    rate = start_network.learning_rate

    def power_cut(step: int, steps: int) -> float:
        if step == 3:
            raise KeyboardInterrupt
        return rate(step, steps)

    with monkeypatch.context() as patch:
        patch.setattr(start_network, "learning_rate", power_cut)
        with pytest.raises(KeyboardInterrupt):
            main(album, stopped)
    assert [p.name for p in stopped.iterdir()] == ["checkpoint.pt"]
    assert start_network.read_checkpoint(stopped / "checkpoint.pt")["step"] == 2
    main(album, stopped)
    assert "step 2/5  going on" in capsys.readouterr().out

    one, other = ((d / "start.safetensors").read_bytes() for d in (whole, stopped))
    assert one == other
    cards = [json.loads((d / "start.json").read_text()) for d in (whole, stopped)]
    for card in cards:
        assert card["sha256"] == hashlib.sha256(one).hexdigest() and card["bytes"] == len(one)
        assert [point["step"] for point in card["curve"]] == [2, 4, 5]
        del card["hours"]
    assert cards[0] == cards[1]


def test_the_end_may_be_moved_and_the_card_says_so(album: Path, tmp_path: Path) -> None:
    main(album, tmp_path / "moved", "--steps", "2")
    main(album, tmp_path / "moved", "--steps", "3")
    card = json.loads((tmp_path / "moved" / "start.json").read_text())
    assert card["schedule"] == [{"from_step": 0, "steps": 2}, {"from_step": 2, "steps": 3}]
    assert [point["step"] for point in card["curve"]] == [2, 3]


def test_another_runs_checkpoint_and_a_broken_one_are_refused(album: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    main(album, out)
    before = (out / "checkpoint.pt").read_bytes()
    with pytest.raises(SystemExit, match="is of another run"):
        main(album, out, "--seed", "1")
    assert (out / "checkpoint.pt").read_bytes() == before
    (out / "checkpoint.pt").write_bytes(before[:100])
    with pytest.raises(SystemExit, match="not a whole checkpoint"):
        main(album, out)


def test_what_ships_has_its_digest_in_the_package(
    album: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "package"
    package.mkdir()
    source = package / "__init__.py"
    shutil.copy(start_network.DIGESTS, source)
    before = source.read_text()
    monkeypatch.setattr(start_network, "DIGESTS", source)
    out = tmp_path / "out"
    main(album, out)
    start_network.main(["--out", str(out), "--ship", "--data", "two pictures of noise"])
    content = (package / "demo-start.safetensors").read_bytes()
    assert content == (out / "start.safetensors").read_bytes()
    card = json.loads((package / "demo-start.json").read_text())
    assert card["sha256"] == hashlib.sha256(content).hexdigest() and card["steps_done"] == 5
    assert card["data"] == "two pictures of noise" and str(tmp_path) not in json.dumps(card)
    changed = [(a, b) for a, b in zip(before.split("\n"), source.read_text().split("\n")) if a != b]  # noqa: B905
    assert len(changed) == 1 and card["sha256"] in changed[0][1]
    source.write_text(before.replace("demo-start", "demo-end"))
    with pytest.raises(SystemExit, match="has no digest of 'demo-start'"):
        start_network.main(["--out", str(out), "--ship", "--data", "x"])


def test_mistakes_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path)
    for words, message in (
        (["--out", out], "--images DIR is needed"),
        (["--out", out, "--ship"], "--ship needs --data TEXT"),
        (["--out", out, "--images", out, "--steps", "0"], "--steps is 0; allowed"),
    ):
        with pytest.raises(SystemExit):
            start_network.main(words)
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match="holds no usable picture"):
        start_network.main(["--out", out, "--images", out])
    with pytest.raises(SystemExit, match="is not there: train first"):
        start_network.main(["--out", str(tmp_path / "new"), "--ship", "--data", "x"])


def test_the_rate_falls_down_half_a_cosine() -> None:
    first, middle, last = (start_network.learning_rate(s, 100) for s in (0, 50, 100))
    assert first == pytest.approx(1e-3) and last == pytest.approx(1e-5)
    assert middle == pytest.approx((1e-3 + 1e-5) / 2)
    assert sum(p.numel() for p in CompactEDSR(torch.Generator()).parameters()) * 4 < 2**20
