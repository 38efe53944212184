"""Options of functions and modules: a module refuses when it is made what its function would refuse
at the first call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import draws
import pytest

from mghf_fast import (
    ContentStyleLoss,
    DECLoss,
    DetailFeatureExtractor,
    HFDiffLoss,
    LocalInformationLoss,
    MGHFLoss,
    functional,
)
from mghf_fast.losses import Preset

MODULES: list[Callable[..., Any]] = [
    MGHFLoss, HFDiffLoss, ContentStyleLoss, LocalInformationLoss, DECLoss,
]  # fmt: skip


@pytest.mark.parametrize("module", MODULES)
def test_every_module_takes_every_way_to_name_a_backend(module: Callable[..., Any]) -> None:
    sr, gt = draws.rand(2, 2, 3, 48, 48)
    values = [module(backend=backend)(sr, gt) for backend in (None, "auto")]
    assert values[0] == values[1]
    module(backend="reference")(sr, gt)
    with pytest.raises(ValueError, match="backend is 'gpu'; allowed are 'auto', 'cuda'"):
        module(backend="gpu")


STYLE = [
    ({"top_m": 0}, "top_m must be at least 1, got 0|top_m must be between 1 and 3, got 0"),
    ({"alpha": -1.0}, "alpha must be above -1, .* got -1.0"),
    ({"alpha": "1"}, "alpha must be a number"),
    ({"gamma": float("nan")}, "gamma must be finite"),
    ({"bins": 1}, "bins must be between 2 and 16777216, got 1"),
    ({"bins": 2**24 + 1}, "bins must be between 2 and 16777216"),
    ({"gram": "maps"}, "gram must be one of 'channel', 'map', got 'maps'"),
]


@pytest.mark.parametrize(("bad", "told"), STYLE)
def test_content_style(bad: dict[str, Any], told: str) -> None:
    x = draws.rand(1, 3, 8, 8)
    with pytest.raises((TypeError, ValueError), match=told):
        functional.content_style_terms(gt=x, sr=x, **bad)
    with pytest.raises((TypeError, ValueError), match=told):
        ContentStyleLoss(**bad)


def test_more_bins_than_float32_has_integers() -> None:
    with pytest.raises(ValueError, match="bins must be between 2 and 16777216"):
        functional.channel_entropy(draws.rand(1, 1, 4, 4), 2**24 + 1)


def test_a_presets_alpha() -> None:
    with pytest.raises(ValueError, match="alpha must be above -1"):
        MGHFLoss(preset=Preset((1, 1, 1), (1, 1, 1), -2.0, 1.0, 24))


DEC = [
    ({"patch_size": 0}, "patch_size must be at least 1, got 0"),
    ({"threshold_db": float("inf")}, "threshold_db must be finite"),
    ({"temperatures": (1.0,)}, "temperatures must be two numbers"),
    ({"temperatures": (0.0, 1.0)}, "temperatures must be finite and above 0"),
    ({"temperature": 0.5}, "temperature must be one of 'inside', 'outside'"),
    ({"similarity": "psnr"}, "similarity must be one of 'rmse', 'l2'"),
    ({"max_value": 0}, "max_value must be finite and above 0"),
    ({"norm_floor": 0}, "norm_floor must be finite and above 0"),
]


@pytest.mark.parametrize(("bad", "told"), DEC)
def test_dec(bad: dict[str, Any], told: str) -> None:
    x = draws.rand(1, 3, 8, 8)
    with pytest.raises((TypeError, ValueError), match=told):
        functional.dec_loss(x, x, **bad)
    with pytest.raises((TypeError, ValueError), match=told):
        DECLoss(**bad)


def test_sizes_of_patches() -> None:
    with pytest.raises(ValueError, match="patch_size must be an integer or 'auto', got 'small'"):
        LocalInformationLoss("small")


def test_a_file_of_weights_is_named_by_text_or_path() -> None:
    with pytest.raises(TypeError, match="name_or_path must be a name or a path, got NoneType"):
        DetailFeatureExtractor.from_pretrained(None)  # type: ignore[arg-type]
