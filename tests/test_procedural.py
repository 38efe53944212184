"""The procedural pictures: a function of seed and index, labelled, and similar to photographs in
two statistics."""

from __future__ import annotations

import numpy as np
import pytest

from mghf_fast.commands.pixels import luminance
from mghf_fast.commands.pretrain import procedural, statistics
from mghf_fast.commands.pretrain.procedural import CLASSES, render


def test_a_picture_is_a_function_of_seed_index_and_size() -> None:
    pixels, label = render(5, 7, 24)
    again, same_label = render(5, 7, 24)
    assert pixels.shape == (24, 24, 3) and pixels.dtype == np.uint8
    assert label == same_label and np.array_equal(pixels, again)
    others = [render(5, 8, 24), render(6, 7, 24)]
    assert not any(np.array_equal(pixels, other) for other, _ in others)


def test_the_global_random_state_is_left_alone() -> None:
    np.random.seed(0)
    before = np.random.random()
    np.random.seed(0)
    render(0, 0, 16)
    assert np.random.random() == before


def test_classes_are_distinct_and_all_are_drawn() -> None:
    names = [kind.name for kind in CLASSES]
    assert len(set(names)) == len(names) == 84
    labels = [
        int(np.random.default_rng([procedural.VERSION, 0, i, 16]).integers(84)) for i in range(900)
    ]
    assert labels[:5] == [render(0, i, 16)[1] for i in range(5)]
    assert set(labels) == set(range(84))


def test_the_camera_blurs_and_adds_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    def finest(lens: float, noise: float) -> float:
        monkeypatch.setattr(procedural, "LENS", (lens, lens))
        monkeypatch.setattr(procedural, "NOISE", (noise, noise))
        greys = [luminance(render(0, i, 48)[0]) for i in range(8)]
        return float(np.mean([np.abs(np.diff(g, 2)).mean() for g in greys]))

    sharp = finest(0.1, 0)
    assert finest(1.0, 0) < 0.6 * sharp < sharp < finest(0.1, 20)


def _angular_energy(pixels: np.ndarray, degrees: int) -> float:
    """Share of the spectral power above 0.1 cycles per pixel within 15 degrees of a direction."""
    grey = luminance(pixels)
    power = np.abs(np.fft.fft2(grey - grey.mean())) ** 2
    frequency = np.fft.fftfreq(len(grey))
    fy, fx = frequency[:, None], frequency[None, :]
    away = np.abs((np.degrees(np.arctan2(fy, fx)) - degrees + 90) % 180 - 90)
    fine = np.hypot(fy, fx) > 0.1
    return float(power[fine & (away < 15)].sum() / power[fine].sum())


def _of_class(wanted: dict[str, object], number: int, size: int = 48) -> list[np.ndarray]:
    found = []
    for index in range(5000):
        label = int(np.random.default_rng([procedural.VERSION, 0, index, size]).integers(84))
        kind = CLASSES[label]._asdict()
        if all(kind[key] == value for key, value in wanted.items()):
            found.append(render(0, index, size)[0])
        if len(found) == number:
            return found
    raise AssertionError(wanted)


@pytest.fixture
def no_camera(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns off the lens's blur and the noise, which would hide the label in so few pictures."""
    monkeypatch.setattr(procedural, "LENS", (0.1, 0.1))
    monkeypatch.setattr(procedural, "NOISE", (0.0, 0.0))


@pytest.mark.usefixtures("no_camera")
@pytest.mark.parametrize("family", procedural.ORIENTED)
def test_the_label_tells_the_orientation(family: str) -> None:
    for true in procedural.ORIENTATIONS:
        pictures = _of_class({"family": family, "orientation": true}, 5)
        energies = {
            o: float(np.mean([_angular_energy(p, o) for p in pictures]))
            for o in procedural.ORIENTATIONS
        }
        assert max(energies, key=energies.__getitem__) == true


@pytest.mark.usefixtures("no_camera")
def test_the_label_tells_the_band() -> None:
    centroids = []
    for band in ("fine", "middle", "coarse"):
        values = []
        for pixels in _of_class({"family": "speckle", "band": band}, 6):
            grey = luminance(pixels)
            power = np.abs(np.fft.fft2(grey - grey.mean())) ** 2
            radius = np.hypot(np.fft.fftfreq(48)[:, None], np.fft.fftfreq(48)[None, :])
            high = radius > 0.08
            values.append((power[high] * radius[high]).sum() / power[high].sum())
        centroids.append(float(np.mean(values)))
    assert centroids[0] > 1.1 * centroids[1] > 1.1**2 * centroids[2]


@pytest.mark.usefixtures("no_camera")
def test_petals_have_softer_edges() -> None:
    def steepness(law: str) -> float:
        """The 99th percentile of the differences, relative to the picture's deviation."""
        pictures = _of_class({"law": law, "family": "cloud", "band": "coarse"}, 24)
        greys = [luminance(p) for p in pictures]
        steep = [np.percentile(np.abs(np.diff(g, axis=0)), 99) / g.std() for g in greys]
        return float(np.mean(steep))

    assert steepness("petals") < 0.85 * min(steepness("discs"), steepness("slabs"))


def test_radii_follow_an_inverse_cube() -> None:
    rng = np.random.default_rng(0)
    counts = np.zeros(2)
    for _ in range(60):
        leaves, _ = procedural._draw_leaves(rng, 64, "discs", 2.0)
        radii = np.concatenate([octave.geometry[2] for _, octave in leaves])
        # Leaves with centres in the picture; others are drawn only if they reach it.
        middles = np.concatenate([octave.geometry[:2] for _, octave in leaves], axis=1)
        radii = radii[((middles >= 0) & (middles < 64)).all(0)]
        counts += [((radii >= a) & (radii < 2 * a)).sum() for a in (2, 4)]
    assert counts.sum() > 3000
    assert counts[0] / counts[1] == pytest.approx(4, rel=0.15)  # (r^-2 - (2r)^-2) falls as r^-2


def test_the_front_leaf_hides_the_others() -> None:
    rng = np.random.default_rng(1)
    for law in procedural.LAWS:
        leaves, total = procedural._draw_leaves(rng, 24, law, 2.0)
        shown = procedural._front_leaf(leaves, total, 24, law == "slabs").reshape(24, 24)
        axis = np.arange(24, dtype=np.float32)
        expected = np.full((24, 24), total)
        for _, octave in leaves:
            covered = octave.cover(axis[:, None], axis[None, :], law == "slabs")
            for cover, order in zip(covered, octave.order, strict=True):
                expected = np.where(cover, np.minimum(expected, order), expected)
        assert np.array_equal(shown, expected)


def test_statistics_of_known_pictures() -> None:
    rng = np.random.default_rng(0)
    white = rng.standard_normal((128, 128))
    radius = np.hypot(np.fft.fftfreq(128)[:, None], np.fft.fftfreq(128)[None, :])
    radius[0, 0] = 1
    brown = np.fft.ifft2(np.fft.fft2(white) / radius).real
    assert statistics.spectrum_slope(white) == pytest.approx(0, abs=0.15)
    assert statistics.spectrum_slope(brown) == pytest.approx(-2, abs=0.15)
    assert statistics.gradient_kurtosis(white) == pytest.approx(3, abs=0.2)
    squares = np.kron(rng.standard_normal((8, 8)), np.ones((16, 16)))
    assert statistics.gradient_kurtosis(squares) > 20


def test_pictures_are_like_photographs() -> None:
    """The medians lie between the first and third quartiles of the photographs' crops, or nearly;
    those of noise and of a picture with only textures do not."""
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    crops = statistics.photograph_crops()
    photographs = statistics.measure(crop for some in crops.values() for crop in some[::3])
    drawn = statistics.measure(render(0, i, statistics.CROP)[0] for i in range(60))
    assert drawn.crops > 50 and photographs.crops > 50
    steep, _, flat = photographs.slope
    assert steep - 0.2 < drawn.slope[1] < flat + 0.2
    low, _, high = photographs.kurtosis
    assert low < drawn.kurtosis[1] < high
    noise = statistics.measure(
        np.random.default_rng(i).integers(0, 256, (128, 128, 3), dtype=np.uint8) for i in range(4)
    )
    assert noise.slope[1] > flat + 0.2 and noise.kurtosis[1] < low


@pytest.mark.parametrize(
    ("arguments", "told"),
    [((-1, 0, 32), "seed is -1"), ((0, -1, 32), "index is -1"), ((0, 0, 15), "size is 15")],
)
def test_bad_input(arguments: tuple[int, int, int], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        render(*arguments)
