"""Pretraining in one process: settings, steps, checkpoints, export, the command line."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import draws
import pytest
import torch

from mghf_fast import DetailFeatureExtractor
from mghf_fast.commands import cli
from mghf_fast.commands.pretrain import (
    batches,
    checkpoint,
    classes,
    distributed,
    network,
    scale,
    train,
)
from mghf_fast.commands.pretrain.settings import PretrainError, Settings
from mghf_fast.commands.pretrain.sources import ProceduralSource
from mghf_fast.commands.table5 import cost

SMALL = "--size 16 --batch 4 --channels 4 --stages 4 --held-out 8 --workers 0"
TINY = ["pretrain", *f"{SMALL} --log-every 2 --evaluate-every 4 --checkpoint-every 2".split()]


def pretrain(out: Path, steps: int, *more: str) -> int:
    return cli.main([*TINY, "--steps", str(steps), "--out", str(out), *more])


def weights(out: Path) -> bytes:
    return (out / "extractor.safetensors").read_bytes()


def card(out: Path) -> dict[str, object]:
    return json.loads((out / "extractor.json").read_text())


def told(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.splitlines()[-1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training of six steps."""
    out = tmp_path_factory.mktemp("finished") / "out"
    assert pretrain(out, 6) == 0
    return out


# ------------------------------------------------------------------------------------------- export


def test_the_weights_load_and_the_card_is_theirs(finished: Path) -> None:
    extractor = DetailFeatureExtractor.from_pretrained(finished / "extractor.safetensors")
    assert extractor.channels == 4
    found = card(finished)
    assert found["sha256"] == hashlib.sha256(weights(finished)).hexdigest()
    assert found["steps"] == 6 and found["images"] == 24 and found["seed"] == 0
    assert found["held_out_accuracy"] == found["curve"][-1]["held_out_accuracy"]
    assert [entry["step"] for entry in found["curve"]] == [2, 4, 6]
    assert found["curve"][0].keys() == {"step", "loss", "learning_rate"}
    assert 0 < found["curve"][1]["invertibility_error"] < 1e-4


def test_the_cards_command_repeats_the_training(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = str(card(finished)["command"]).split()
    assert words[0] == "mghf-fast"
    words[words.index("--out") + 1] = str(tmp_path / "again")
    assert cli.main(words[1:]) == 0
    assert weights(tmp_path / "again") == weights(finished)


def test_training_moves_every_weight_of_the_extractor(finished: Path) -> None:
    settings = Settings(channels=4, stages=(4,), size=16)
    before = classes.build(settings, 84).extractor
    state = torch.load(finished / "checkpoint.pt", weights_only=True)["network"]
    for name, value in before.state_dict().items():
        assert not torch.equal(value, state[f"extractor.{name}"]), name


# --------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stopped_training_goes_on_exactly(finished: Path, tmp_path: Path, workers: int) -> None:
    out, more = tmp_path / "out", ("--workers", str(workers), "--resume")
    for steps in (1, 3, 6):
        assert pretrain(out, steps, *more) == 0
    assert weights(out) == weights(finished)
    assert card(out)["steps"] == 6


def test_the_learning_rate_goes_on(tmp_path: Path) -> None:
    whole, parts, decay = tmp_path / "whole", tmp_path / "parts", ("--lr-every", "2")
    assert pretrain(whole, 6, *decay, "--lr-decay", "0.5") == 0
    assert pretrain(parts, 3, *decay, "--lr-decay", "0.5") == 0
    assert pretrain(parts, 6, *decay, "--lr-decay", "0.5", "--resume") == 0
    assert weights(parts) == weights(whole)
    rates = [entry["learning_rate"] for entry in card(whole)["curve"]]
    assert rates == pytest.approx([2.5e-4, 1.25e-4, 6.25e-5])


def test_a_checkpoint_of_before_objectives_goes_on(tmp_path: Path) -> None:
    whole, old, start = (
        tmp_path / "whole",
        tmp_path / "old",
        ("--clamp", "none", "--init", "linear"),
    )
    assert pretrain(whole, 6, *start) == 0
    assert pretrain(old, 4, *start) == 0
    state = torch.load(old / "checkpoint.pt", weights_only=True)
    said = json.loads(state["configuration"])
    assert said.pop("objective") == "classes" and said.pop("init") == "linear"
    del state["parts"]
    torch.save({**state, "configuration": json.dumps(said)}, old / "checkpoint.pt")
    assert pretrain(old, 6, *start, "--resume") == 0
    assert weights(old) == weights(whole)


def test_the_card_tells_a_free_clamp(tmp_path: Path) -> None:
    assert pretrain(tmp_path, 2, "--clamp", "none") == 0
    found = card(tmp_path)
    assert "--clamp none" in str(found["command"]) and found["extractor"]["clamp"] is None


def test_nothing_is_overwritten(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    assert pretrain(finished, 8) == 2
    assert "checkpoint.pt is there already: --resume goes on from it" in told(capsys)
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before
    (tmp_path / "extractor.json").write_text("mine")
    assert pretrain(tmp_path, 2, "--resume") == 2
    assert "extractor.json is there already" in told(capsys)
    assert (tmp_path / "extractor.json").read_text() == "mine"
    (tmp_path / "file").write_text("mine")
    assert pretrain(tmp_path / "file", 2) == 2
    assert "--out" in told(capsys)


@pytest.mark.parametrize(
    ("words", "difference"),
    [
        ("--batch 2", "batch is 4 there and 2 here"),
        ("--clamp none", "clamp is 2.0 there and None here"),
        ("--init linear", "init is curved there and linear here"),
        (
            "--seed 1 --lr 1",
            "learning_rate is 0.0005 there and 1.0 here; seed is 0 there and 1 here",
        ),
        ("--held-out 9", "data, held out is 8 there and 9 here"),
    ],
)
def test_another_configuration_is_named(
    finished: Path, words: str, difference: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished / "checkpoint.pt").read_bytes()
    assert pretrain(finished, 8, "--resume", *words.split()) == 2
    error = told(capsys)
    assert "is a checkpoint of another configuration" in error and difference in error
    assert (finished / "checkpoint.pt").read_bytes() == before


class _Code:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("ran"),)


def test_a_broken_checkpoint_is_refused_and_never_run(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    content = (finished / "checkpoint.pt").read_bytes()
    Path("pickled").mkdir()
    torch.save({"format": 1, "configuration": "{}", "code": _Code()}, "pickled/checkpoint.pt")
    pickled = Path("pickled/checkpoint.pt").read_bytes()
    for broken in (content[:-100], content[: len(content) // 2], b"", b"text", pickled):
        out = tmp_path / "out"
        out.mkdir(exist_ok=True)
        (out / "checkpoint.pt").write_bytes(broken)
        assert pretrain(out, 8, "--resume") == 2
        assert "is not a whole checkpoint" in told(capsys)
        assert (out / "checkpoint.pt").read_bytes() == broken
    assert not (tmp_path / "ran").exists()


def test_a_loss_that_is_no_number_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert pretrain(out, 2) == 0
    before = (out / "checkpoint.pt").read_bytes()
    prepared = classes.scaled

    def broken(*arguments: object) -> torch.Tensor:
        return prepared(*arguments) * float("nan")  # type: ignore[arg-type]

    monkeypatch.setattr(classes, "scaled", broken)
    assert pretrain(out, 6, "--resume") == 2
    assert "the loss became nan before step 4; lower --lr" in told(capsys)
    # Without an entry of the curve in between, the weights themselves are checked.
    assert pretrain(out, 6, "--resume", "--log-every", "100", "--evaluate-every", "100") == 2
    assert "a weight became infinite or no number before step 4" in told(capsys)
    assert (out / "checkpoint.pt").read_bytes() == before


def test_leftovers_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".checkpoint.pt.123.tmp").write_text("half")
    assert pretrain(tmp_path, 2) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint.pt", "extractor.json", "extractor.safetensors",
    ]  # fmt: skip


# -------------------------------------------------------------------------------- batches and ranks


def test_ranks_share_each_batch_and_no_image_comes_twice() -> None:
    source = ProceduralSource(0, 16, 100, 8)

    def images(first: int, last: int, rank: int, ranks: int) -> list[torch.Tensor]:
        found = batches.training_batches(
            source, first, last, batch=4, rank=rank, ranks=ranks, workers=0
        )
        return [batch.images for batch in found]

    whole = images(0, 3, 0, 1)
    halves = [images(0, 3, rank, 2) for rank in range(2)]
    for one, *two in zip(whole, *halves, strict=True):
        assert torch.equal(one, torch.cat(two))
    assert torch.equal(images(2, 3, 0, 1)[0], whole[2])
    flat = torch.cat(whole).flatten(1)
    held_out = torch.cat([b.images for b in batches.held_out_batches(source, 3, 0, 1)]).flatten(1)
    assert len({row.numpy().tobytes() for row in torch.cat([flat, held_out])}) == 12 + 8
    shared = [
        len(b.labels) for rank in range(3) for b in batches.held_out_batches(source, 8, rank, 3)
    ]
    assert shared == [3, 3, 2]


def test_images_are_scaled_to_minus_one_and_one() -> None:
    levels = torch.tensor([0, 255], dtype=torch.uint8)
    assert batches.scaled(levels, torch.device("cpu")).tolist() == [-1, 1]


# ----------------------------------------------------------------------------------------- autocast


def test_autocast_leaves_the_extractor_in_float32(tmp_path: Path) -> None:
    settings = Settings(channels=4, stages=(4,), size=16, batch=4, amp="bfloat16", device="cpu")
    source = ProceduralSource(0, 16, 100, 8)
    run = classes.ClassesRun(settings, source, distributed.Ranks(), torch.device("cpu"))
    seen = {}

    def note(name: str, output: torch.Tensor) -> None:
        seen[name] = output.dtype

    run.network.extractor.register_forward_hook(lambda *a: note("features", a[2]))
    run.network.stages.register_forward_hook(lambda *a: note("stages", a[2]))
    batch = next(batches.training_batches(source, 0, 1, batch=4, rank=0, ranks=1, workers=0))
    run.train_on(batch)
    assert seen == {"features": torch.float32, "stages": torch.bfloat16}
    assert run.is_finite() and run.step == 1


# -------------------------------------------------------------------------------------------- scale


@pytest.mark.parametrize("subnet", ["bottleneck", "conv2"])
@pytest.mark.parametrize("clamp", [None, 1.5])
@pytest.mark.parametrize("blocks", [1, 2])
def test_a_power_of_two_is_drawn_into_the_weights_exactly(
    subnet: str, clamp: float | None, blocks: int
) -> None:
    extractor = DetailFeatureExtractor(3, 8, blocks, subnet=subnet, clamp=clamp)
    image = draws.randn(2, 3, 9, 8)
    before = extractor(image)
    scale.scale_features(extractor, 0.125)
    assert torch.equal(extractor(image), before * 0.125)
    assert extractor.invertibility_error(image) < 1e-5
    for wrong in (0.3, 0.0, -2.0):
        with pytest.raises(ValueError, match="factor must be a power of two"):
            scale.scale_features(extractor, wrong)


def test_the_factor_restores_the_response() -> None:
    extractor, image = DetailFeatureExtractor(3, 8), draws.randn(2, 3, 16, 16)
    before = scale.response(extractor, image)
    scale.scale_features(extractor, 16)
    after = scale.response(extractor, image)
    assert after == pytest.approx(256 * before)
    assert scale.power_of_two(before, after) == 1 / 16
    assert scale.power_of_two(before, 0.0) == scale.power_of_two(0.0, 1.0) == 1


def test_exported_features_have_the_scale_of_new_ones(finished: Path) -> None:
    settings = Settings(channels=4, stages=(4,), size=16)
    new = classes.build(settings, 84).extractor
    image = draws.rand(4, 3, 32, 32) * 2 - 1
    trained = DetailFeatureExtractor.from_pretrained(finished / "extractor.safetensors")
    ratio = scale.response(trained, image) / scale.response(new, image)
    assert 0.25 < ratio < 4


# ------------------------------------------------------------------------------------------ dry run


def test_dry_run_counts_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert pretrain(out, 1000, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "84 classes, 50000 images an epoch, 8 held out" in shown
    assert "288 in the extractor" in shown and "1000 steps, about" in shown
    assert not out.exists()


def test_multiply_adds_follow_the_squeeze() -> None:
    classifier = network.Classifier(DetailFeatureExtractor(stem="squeeze"), (64,), 10)
    extractor, head = network.multiply_adds(classifier, 64)
    weights = sum(p.numel() for p in classifier.extractor.parameters() if p.dim() > 1)
    assert extractor == weights * 16 * 16
    assert head == 9 * 128 * 64 * 8 * 8 + 640


def test_multiply_adds_are_those_of_table_5() -> None:
    classifier = network.Classifier(DetailFeatureExtractor(), (64,), 10)
    extractor, head = network.multiply_adds(classifier, 64)
    pair = cost.extractor(cost.Setting(height=64, width=64), with_stem=True)
    assert extractor == pair.macs // 2
    assert head == 9 * 128 * 64 * 32 * 32 + 640


# --------------------------------------------------------------------------------------- bad words


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("--batch 1", "--batch is 1; it must be at least 2"),
        ("--size 8", "--size is 8; it must be at least 16"),
        ("--lr 0", "--lr is 0.0; it must be finite and above 0"),
        ("--lr nan", "--lr is nan"),
        ("--channels 5", "--channels is 5; it must be even"),
        ("--weight-decay -1", "--weight-decay is -1.0"),
        ("--stages 4 0", "--stages has a width of 0"),
        ("--amp float16 --device cpu", "--amp is float16, which needs a GPU"),
        ("--data nowhere", "--data nowhere: allowed are 'procedural', one directory"),
        ("--seed -1", "--seed is -1"),
        ("--clamp 0", "--clamp is 0.0; it must be finite and above 0"),
        ("--stem squeeze", "--channels is 4; with --squeeze 4 it must be at least 48"),
        (
            "--stem squeeze --channels 192 --squeeze 8 --size 20",
            "--size is 20; it must be a multiple of --squeeze 8",
        ),
        ("--hint 1", "--hint belongs to --objective distances, and the objective is classes"),
    ],
)
def test_bad_words_are_told_in_one_line(
    words: str, error: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert pretrain(out, 2, *words.split()) == 2
    errors = capsys.readouterr().err
    assert error in errors and errors.count("\n") == 1
    assert not out.exists()


def test_cuda_that_is_not_there() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(PretrainError, match="--device is cuda; there is none"):
        train.device_of(Settings(device="cuda"))


def test_tensorboard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert pretrain(tmp_path / "a", 2, "--tensorboard") == 2
    assert 'pip install "mghf_fast[pretrain]"' in told(capsys)
    monkeypatch.undo()
    pytest.importorskip("tensorboard")
    assert pretrain(tmp_path / "b", 2, "--tensorboard") == 0
    assert list((tmp_path / "b" / "tensorboard").glob("events.*"))


def test_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    checkpoint.write(path, b"old")

    def refuse(*_: Sequence[object]) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(
        PretrainError, match=r"No space left on device \(the earlier one is whole\)"
    ):
        checkpoint.write(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
