"""The shipped weights: complete, checked, the same everywhere, and suitable for the presets."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import contract
import draws
import pytest
import torch

from mghf_fast import DetailFeatureExtractor, MGHFLoss, weights
from mghf_fast.commands.pretrain import procedural, scale
from mghf_fast.losses.mghf import random_extractor

NAMES = sorted(weights.SHA256)

EXPECTED = {
    "perceptual-v1": (1.730453, 2.215743, -0.6600043),
    "procedural-v1": (0.09292394, 0.1277673, 0.02279955),
}
"""Features of a synthetic image: mean absolute value, standard deviation, and one value."""


def pictures(number: int, size: int = 48) -> torch.Tensor:
    """(number, 3, size, size) in [-1, 1], from a stream that was not trained on."""
    drawn = [torch.from_numpy(procedural.render(10**6, i, size)[0]) for i in range(number)]
    return torch.stack(drawn).permute(0, 3, 1, 2).float() / 127.5 - 1


@pytest.mark.parametrize("name", NAMES)
def test_file_digest_and_card_belong_together(name: str) -> None:
    content, card = weights.path(name).read_bytes(), weights.card(name)
    assert hashlib.sha256(content).hexdigest() == weights.SHA256[name] == card["sha256"]
    assert len(content) == card["bytes"]
    extractor = DetailFeatureExtractor.from_pretrained(name)
    assert extractor.config == card["extractor"]
    assert sum(p.numel() for p in extractor.parameters()) == card["parameters"]
    assert extractor.to_safetensors() == content


def test_the_cards_say_what_was_learned_and_from_what() -> None:
    card = weights.card("procedural-v1")
    assert "substitute for ImageNet" in card["note"]
    assert card["held_out_accuracy"] > 10 * card["chance_accuracy"]
    card = weights.card("perceptual-v1")
    assert "BSDS500" in card["data"] and card["teacher"]["licence"] == "BSD-2-Clause"
    assert card["held_out_correlation"] > 0.95
    # What an extractor must keep: octaves within a factor of 4, and an inverse in float32.
    assert card["octave_spread"] < 4 and card["invertibility_error"] < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_the_same_features_everywhere(name: str) -> None:
    extractor = DetailFeatureExtractor.from_pretrained(name)
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    image = torch.stack([(x / 15 - 0.5), (x * y).sin(), ((y - 7) / 8)])[None]
    with torch.no_grad():
        features = extractor(image).double()
    found = [float(v) for v in (features.abs().mean(), features.std(), features[0, 5, 3, 3])]
    assert found == pytest.approx(EXPECTED[name], rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_loading_takes_no_random_numbers(name: str) -> None:
    state = torch.random.get_rng_state()
    DetailFeatureExtractor.from_pretrained(name)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("name", NAMES)
def test_a_truncated_altered_or_missing_file_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = weights.path(name).read_bytes()
    monkeypatch.setattr(weights, "_FOLDER", tmp_path)
    with pytest.raises(FileNotFoundError, match="missing from this installation"):
        DetailFeatureExtractor.from_pretrained(name)
    changed = bytearray(content)
    changed[len(content) // 2] ^= 1  # one bit of one weight: still a complete safetensors file
    for broken in (bytes(changed), content[:-4], b""):
        (tmp_path / f"{name}.safetensors").write_bytes(broken)
        with pytest.raises(ValueError, match="SHA-256 differs"):
            DetailFeatureExtractor.from_pretrained(name)
    (tmp_path / f"{name}.safetensors").write_bytes(content)
    DetailFeatureExtractor.from_pretrained(name)


@pytest.mark.parametrize("name", NAMES)
def test_the_blocks_can_be_undone(name: str) -> None:
    extractor = DetailFeatureExtractor.from_pretrained(name)
    assert extractor.invertibility_error(pictures(4)) < 1e-4


def test_features_have_the_scale_that_the_published_weights_are_made_for() -> None:
    extractor, image = DetailFeatureExtractor.from_pretrained("procedural-v1"), pictures(16)
    torch.manual_seed(0)
    untrained = DetailFeatureExtractor(init="linear", clamp=None)  # the start of their training
    ratio = scale.response(extractor, image) / scale.response(untrained, image)
    assert abs(math.log2(ratio)) < 2


def test_losses_take_them_by_name() -> None:
    gt = pictures(2)
    sr = gt + 0.05 * draws.randn_like(gt)
    for name in ("random", *NAMES):
        loss = MGHFLoss("n", extractor=name)
        expected = random_extractor() if name == "random" else None
        expected = expected or DetailFeatureExtractor.from_pretrained(name)
        assert contract.relative_error(loss.extractor(gt), expected(gt)) == 0
        assert not list(loss.extractor.parameters())
        assert 0 < float(loss(sr, gt)) < math.inf
    with pytest.raises(
        ValueError, match="extractor must be one of 'random', 'perceptual-v1', 'procedural-v1'"
    ):
        MGHFLoss(extractor="imagenet")
    with pytest.raises(
        ValueError, match=r"weights that ship \('perceptual-v1', 'procedural-v1'\), got 'imagenet'"
    ):
        DetailFeatureExtractor.from_pretrained("imagenet")
    with pytest.raises(ValueError, match="one of perceptual-v1, procedural-v1, got '../x'"):
        weights.path("../x")
