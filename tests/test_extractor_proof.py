"""`python -m benchmarks.extractor`: what it measures, on tiny sizes, and what it concludes."""

from __future__ import annotations

import copy
import functools
import io
import itertools
import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("skimage")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")
Image = pytest.importorskip("PIL.Image")

from benchmarks.extractor import (  # noqa: E402
    __main__ as command,
)
from benchmarks.extractor import (  # noqa: E402
    finetuning,
    inversion,
    page,
    retrieval,
    scenes,
    sensitivity,
    subjects,
    verdicts,
)
from benchmarks.report import ROOT  # noqa: E402
from benchmarks.results import RESULTS  # noqa: E402
from mghf_fast import DetailFeatureExtractor, MGHFLoss  # noqa: E402
from mghf_fast.demo.photographs import Collection, Photograph  # noqa: E402
from mghf_fast.demo.settings import DemoSettings  # noqa: E402


@pytest.fixture(scope="module")
def trained() -> DetailFeatureExtractor:
    torch.manual_seed(7)
    return DetailFeatureExtractor(3, 8).eval().requires_grad_(False)


def texture(side: int, angle: float, period: float, seed: int = 0) -> Tensor:
    """A grating with noise, (3, side, side)."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    wave = torch.sin((x * math.cos(angle) + y * math.sin(angle)) * 2 * math.pi / period)
    noise = torch.randn(3, side, side, generator=generator)
    return (0.5 + 0.25 * wave + 0.03 * noise).clamp(0, 1)


@functools.cache
def textures() -> list[scenes.Scene]:
    """Four gratings of their own direction and period."""
    return [scenes.Scene(f"texture {i}", texture(64, 0.7 * i, 3 + 2 * i, seed=i)) for i in range(4)]


# ---- what is compared ----------------------------------------------------------------------------


def test_random_extractors_repeat_and_leave_chance_alone(trained: DetailFeatureExtractor) -> None:
    state = torch.get_rng_state()
    one, again, other = (subjects.random_extractor(trained, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert one.config == trained.config and not one.training
    assert subjects.digest(one) == subjects.digest(again) != subjects.digest(other)
    changed = copy.deepcopy(one)
    changed.blocks[0].mix.bias[0] += 1e-3
    assert subjects.digest(changed) != subjects.digest(one)


@pytest.mark.parametrize(
    ("layer", "channels", "side"), [("relu1_2", 64, 16), ("relu2_2", 128, 8), ("relu3_3", 256, 4)]
)
def test_layers_of_vgg(layer: str, channels: int, side: int) -> None:
    network = subjects.vgg16(layer, 0)
    features = network(torch.randn(1, 3, 16, 16))
    assert features.shape == (1, channels, side, side) and features.min() == 0


# ---- retrieval -----------------------------------------------------------------------------------


def test_crops_are_of_textured_regions_and_do_not_overlap() -> None:
    numbers = torch.arange(40 * 60, dtype=torch.float32).view(1, 40, 60).expand(3, -1, -1) / 2400
    flat = torch.zeros(3, 40, 60)
    found = scenes.crops([scenes.Scene("flat", flat), scenes.Scene("ramp", numbers)], 8, 4)
    assert found.images.shape == (16, 3, 8, 8)  # four regions of four crops
    assert found.scene.unique().tolist() == [1] and found.region.bincount().tolist() == [4] * 4
    values = found.images[:, 0].flatten()
    assert len(values.unique()) == len(values)
    with pytest.raises(ValueError, match="no photograph has two textured regions of 16 x 16"):
        scenes.crops([scenes.Scene("flat", flat)], 8, 4)


def test_without_colour_brightness_and_contrast_say_nothing() -> None:
    images = torch.stack([scene.image for scene in textures()])
    tinted = images * torch.tensor([0.4, 0.4, 0.4]).view(1, 3, 1, 1) + 0.3
    torch.testing.assert_close(scenes.without_colour(images), scenes.without_colour(tinted))
    grey = scenes.without_colour(images)
    assert torch.equal(grey[:, 0], grey[:, 2])
    assert grey.mean((2, 3)).sub(0.5).abs().max() < 1e-5


def test_retrieval_and_probe_between_knowing_all_and_nothing() -> None:
    data = scenes.crops(textures(), 8, 4)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(data.images), 6, generator=generator, dtype=torch.float64)
    of_region = F.one_hot(data.region).double() + 0.01 * noise[:, :1]
    by_region, by_photograph = retrieval.neighbours(of_region, data)
    assert by_region == 1 and by_photograph < 0.6  # its own region does not count for the latter
    assert max(retrieval.neighbours(noise, data)) < 0.4
    of_scene = F.one_hot(data.scene).double() + 0.01 * noise[:, :1]
    assert retrieval.neighbours(of_scene, data)[1] == 1
    assert retrieval.probe(of_scene, data) == 1
    assert retrieval.probe(noise, data) < 0.6


def test_a_part_of_retrieval(trained: DetailFeatureExtractor) -> None:
    compared = [
        subjects.of_extractor(subjects.TRAINED, trained),
        subjects.of_extractor(subjects.RANDOM, subjects.random_extractor(trained, 1), 1),
        subjects.Subject(subjects.PIXELS, lambda image: image),
    ]
    part = retrieval.measure(compared, textures(), side=16, regions=4)
    assert part["crops"] == 64 and part["regions"] == 16 and part["photographs"] == 4
    assert part["chance"] == {"region": round(3 / 63, 4), "photograph": 0.2, "probe": 0.25}
    assert len(part["rows"]) == 6
    # Gratings of other directions and periods: their statistics tell them apart, thumbnails do not.
    by_name = {row["subject"]: row for row in part["rows"] if row["images"] == "grey"}
    assert by_name["trained"]["probe"] > 0.9 > by_name["raw pixels"]["probe"]


# ---- inversion -----------------------------------------------------------------------------------


def test_the_stem_is_undone_exactly(trained: DetailFeatureExtractor) -> None:
    stem = copy.deepcopy(trained.stem).double()
    image = torch.randn(2, 3, 7, 9, dtype=torch.float64)
    torch.testing.assert_close(inversion.undo_stem(stem, stem(image)), image, rtol=0, atol=1e-9)


def test_the_inverse_gives_the_image_back(trained: DetailFeatureExtractor) -> None:
    image = textures()[0].image[None, :, :20, :24]
    full = inversion.psnr(inversion.exact(trained, image, torch.float32), image)
    half = inversion.psnr(inversion.exact(trained, image, torch.bfloat16), image)
    assert full > 100 > half > 35
    with pytest.raises(ValueError, match="only an extractor with stem='conv'"):
        inversion.exact(DetailFeatureExtractor(3, 8, stem="residual"), image, torch.float32)


def test_descent_keeps_to_its_budget_and_gets_nearer() -> None:
    image = textures()[1].image[None, :, :16, :16]
    calls = 0

    def blurred(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return F.avg_pool2d(x, 3, 1)

    near = [inversion.psnr(inversion.descend(blurred, image, budget), image) for budget in (3, 40)]
    assert near[0] < near[1]
    calls = 0
    inversion.descend(blurred, image, 10)
    assert calls <= 10 + 1 + 25  # the target, and a line search that was under way
    # What pooling drops does not come back; what all of the image is in does.
    pooled = inversion.descend(lambda x: F.avg_pool2d(x, 4), image, 40)
    assert inversion.psnr(pooled, image) < 25
    assert inversion.psnr(inversion.descend(lambda x: 3 * x, image, 20), image) > 60


def test_a_part_of_inversion(trained: DetailFeatureExtractor) -> None:
    windows = [scenes.Scene(s.name, s.image[:, :16, :16]) for s in textures()[:2]]
    part, strip = inversion.measure(trained, windows, [1, 2], budget=3)
    kinds = [(row["subject"], row["how"], row["seed"]) for row in part["rows"]]
    assert len(kinds) == len(set(kinds)) == 3 * 3 + 3
    assert all(len(row["psnr"]) == 2 for row in part["rows"])
    with Image.open(io.BytesIO(strip)) as image:
        assert image.size == (6 * 38 + 6, 24 + 2 * 38)


# ---- sensitivity ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sensitivity.DISTORTIONS)
def test_distortions_grow_with_their_strength(name: str) -> None:
    image = texture(48, 0.4, 7)
    before = image.clone()
    distort, low, high = sensitivity.DISTORTIONS[name]
    strengths = np.geomspace(low, high * 0.5, 5)
    errors = [sensitivity.mse(distort(image, float(s)), image) for s in strengths]
    assert errors == sorted(errors) and errors[-1] > 3e-4
    assert torch.equal(image, before)
    flat = torch.full((3, 48, 48), 0.5)
    if name != "noise":
        assert (distort(flat, float(strengths[2])) - flat).abs().max() < 0.01


def test_ringing_cuts_off_and_rings() -> None:
    x = torch.arange(64)
    low, high = (torch.cos(math.pi * k * (x + 0.5) / 64).expand(3, 8, -1) for k in (10, 40))
    cut = sensitivity.ringing(low + high, 1 / 0.2)  # 40 half cycles in 64 pixels are 0.31
    torch.testing.assert_close(cut, low, rtol=0, atol=1e-5)
    step = (x > 31).float().expand(3, 8, -1)
    assert sensitivity.ringing(step, 6).max() > 1.05


@pytest.mark.parametrize("name", sensitivity.DISTORTIONS)
def test_one_psnr_for_all(name: str) -> None:
    image = textures()[3].image
    found, _ = sensitivity.at_psnr(name, image, 30)
    assert -10 * math.log10(sensitivity.mse(found, image)) == pytest.approx(
        30, abs=1 if name == "JPEG" else 0.05
    )


def test_response_and_order() -> None:
    windows = textures()[:2]

    def of_edges(a: Tensor, b: Tensor) -> float:
        return sensitivity.mse(a.diff(dim=2), b.diff(dim=2))

    def values(distance: Any) -> dict[str, list[float]]:
        return {
            name: [distance(sensitivity.at_psnr(name, s.image, 30)[0], s.image) for s in windows]
            for name in ("noise", "blur")
        }

    errors = values(sensitivity.mse)
    assert sensitivity.response(errors, errors) == {"noise": 1, "blur": 1}
    assert sensitivity.response(values(of_edges), errors)["blur"] < 0.97  # noise has more edges
    assert sensitivity.response(
        {"noise": [1, 1], "blur": [2, 8]}, {"noise": [1, 1], "blur": [1, 1]}
    )["blur"] == pytest.approx(4)
    assert sensitivity.order([[1, 2, 3], [1, 3, 2]]) == (5, 6)
    assert sensitivity.order([[1, 1]]) == (0, 1)


def test_the_response_to_an_octave() -> None:
    image = texture(64, 0, 8)
    for low, high in sensitivity.OCTAVES:
        noise = sensitivity.octave_noise(image, low, high)
        assert float(noise.square().mean().sqrt()) == pytest.approx(2 / 255, rel=1e-4)
        power = torch.fft.fft2(noise.double()).abs().square().sum(0)
        f = torch.fft.fftfreq(64, dtype=torch.float64)
        radius = (f[:, None].square() + f.square()).sqrt()
        assert float(power[(radius >= low) & (radius < high)].sum() / power.sum()) > 0.99999

    def gradient(image: Tensor) -> Tensor:  # whose square grows nearly as that of the frequency
        return torch.cat((image.roll(1, 3) - image, image.roll(1, 2) - image), 1)

    scene = [scenes.Scene("a", image)]
    found = sensitivity.by_octave(gradient, scene)  # type: ignore[arg-type]
    assert found[-1] == 1 and all(2.5 < b / a < 5.5 for a, b in itertools.pairwise(found))
    flat = sensitivity.by_octave(lambda image: image, scene)  # type: ignore[arg-type, return-value]
    assert flat == pytest.approx([1] * 5, rel=1e-3)


def test_a_part_of_sensitivity(
    trained: DetailFeatureExtractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensitivity, "LEVELS", {"blur": (0.5, 1.0), "noise": (2, 8)})
    part = sensitivity.measure(trained, textures()[:2], [1])
    assert [(r["subject"], r["metric"]) for r in part["rows"]] == [
        ("MSE", "MSE"), ("trained", "MGHF-n"), ("trained", "MGHF-c"),
        ("random", "MGHF-n"), ("random", "MGHF-c"),
    ]  # fmt: skip
    for row in part["rows"]:
        assert row["response"]["noise"] == 1 and row["order"]["blur"][1] == 2
        assert row["curve"]["noise"][1] == pytest.approx(1)
    assert part["rows"][0]["response"] == dict.fromkeys(sensitivity.DISTORTIONS, 1)
    assert [(r["subject"], r["response"][-1]) for r in part["octaves"]] == [
        ("trained", 1), ("random", 1),
    ]  # fmt: skip
    # The rows are what the losses say of one picture, one at a time.
    loss = MGHFLoss("n", extractor=trained, input_range="0,1")
    ratios = [
        float(loss(sensitivity.noise(s.image, 2)[None], s.image[None]))
        / float(loss(sensitivity.noise(s.image, 8)[None], s.image[None]))
        for s in textures()[:2]
    ]
    assert part["rows"][1]["curve"]["noise"][0] == pytest.approx(sum(ratios) / 2, rel=1e-3)


# ---- fine-tuning ---------------------------------------------------------------------------------


def collection() -> Collection:
    shown = [
        Photograph(f"{i}", (texture(96, i, 5 + i) * 255).permute(1, 2, 0).byte().numpy())
        for i in range(3)
    ]
    return Collection(shown[:2], shown[2:])


def louder(extractor: DetailFeatureExtractor) -> DetailFeatureExtractor:
    result = copy.deepcopy(extractor)
    for parameter in (result.stem.weight, result.stem.bias):
        parameter *= 10
    return result


def test_a_part_of_fine_tuning(trained: DetailFeatureExtractor) -> None:
    settings = DemoSettings(steps=1, pretrain_steps=1, batch=1, patch=56)
    said: list[str] = []
    part = finetuning.measure(louder(trained), [0], settings, collection(), said.append)
    by_name = {row["objective"]: row for row in part["rows"]}
    assert list(by_name) == ["L1 alone", "random", "trained", "trained, gradient matched"]
    assert len(said) == 4 and part["held_out"] == ["2"]
    weights = [row["weight"] for row in part["rows"]]
    assert weights[:3] == [0, 1, 1] and weights[3] < 0.8  # its gradient is longer
    assert all(math.isfinite(row["psnr"]) for row in part["rows"])
    assert len({row["psnr"] for row in part["rows"]}) > 1


def test_the_matched_weight_gives_gradients_of_one_length(trained: DetailFeatureExtractor) -> None:
    network = finetuning.CompactEDSR(torch.Generator().manual_seed(0))
    data = [(torch.rand(1, 3, 14, 14), torch.rand(1, 3, 56, 56)) for _ in range(2)]
    ours, theirs = (finetuning.perceptual(e) for e in (louder(trained), trained))
    lengths = [finetuning.gradient_length(t, network, iter(data)) for t in (ours, theirs)]
    assert lengths[0] > 1.5 * lengths[1]
    weight = lengths[1] / lengths[0]

    def weighted(sr: Tensor, gt: Tensor) -> dict[str, Tensor]:
        return {"total": weight * ours(sr, gt)["total"]}

    assert finetuning.gradient_length(weighted, network, iter(data)) == pytest.approx(
        lengths[1], rel=1e-5
    )


# ---- verdicts and page ---------------------------------------------------------------------------


def made_up(gain: float) -> dict[str, Any]:
    """A whole result in which the trained extractor is better by ``gain``, in units of the random
    ones' deviation."""
    random = [0.50, 0.52, 0.54]
    value = 0.52 + 0.02 * gain
    names = [("trained", 0, value), *(("random", i, r) for i, r in enumerate(random))]
    extra = [("VGG-16 layout, random", 0, 0.4), ("raw pixels", 0, 0.1)]
    rows = [
        {"subject": name, "seed": seed, "images": images}
        | dict.fromkeys(("region", "photograph", "probe"), v)
        for name, seed, v in names + extra
        for images in ("grey", "colour")
    ]
    inverted = [
        {"subject": name, "seed": seed, "how": how, "psnr": [100 * v, 100 * v]}
        for name, seed, v in names
        for how in ("exact", "exact, bfloat16", "descent")
    ]
    inverted += [
        {"subject": f"VGG-16 {layer}", "seed": 0, "how": "descent", "psnr": [p, p]}
        for layer, p in (("relu1_2", 30.0), ("relu2_2", 500.0))
    ]
    responses = [
        {
            "subject": name,
            "seed": seed,
            "metric": metric,
            "response": {"blur": 1 + v, "noise": 1.0, "JPEG": 1.1, "ringing": 1.2},
            "order": {"blur": (round(1000 * v), 1000), "noise": (1000, 1000)},
            "curve": {"blur": [0.1, 1.0], "noise": [0.2, 1.0]},
        }
        for name, seed, v in names
        for metric in ("MGHF-n", "MGHF-c")
    ]
    responses.append(responses[0] | {"subject": "MSE", "metric": "MSE"})
    tuned = [
        {
            "objective": objective,
            "seed": seed,
            "weight": 1.0,
            "psnr": 25.0 + seed,
            "ssim": 0.8,
            "hf_error": 9 - better * (0.1 + 0.002 * seed),
            "hf_energy": 0.2,
            "hf_correlation": 0.3 + 0.01 * seed + better * (0.01 + 0.0002 * seed),
            "sharpness": 0.6,
        }
        for seed in range(3)
        for objective, better in (
            ("L1 alone", 0.0), ("random", 0.0), ("trained", 0.5 * gain),
            ("trained, gradient matched", gain),
        )
    ]  # fmt: skip
    return {
        "machine": {"name": "toy-2c", "cpu": "Toy", "torch": "2.x"},
        "weights": {
            "name": "w.safetensors", "parameters": 1234, "sha256": "ab" * 32,
            "config": {"blocks": 1},
        },
        "parts": {
            "retrieval": {
                "side": 64, "crops": 40, "regions": 10, "photographs": 4,
                "chance": {"region": 0.07, "photograph": 0.2, "probe": 0.25}, "rows": rows,
                "crops_probed": 20,
            },
            "inversion": {"photographs": ["a", "b"], "side": 64, "budget": 200, "rows": inverted},
            "sensitivity": {
                "photographs": ["a", "b"], "side": 96, "psnr": 30.0,
                "levels": {"blur": [0.5, 1.0], "noise": [2, 8]}, "rows": responses,
                "octaves": [
                    {"subject": name, "seed": seed, "response": [0.1 + seed] * 4 + [1]}
                    for name, seed in (("trained", 0), ("random", 0), ("random", 1))
                ],
            },
            "fine-tuning": {
                "pretrain_steps": 10, "steps": 5, "batch": 4, "patch": 96,
                "held_out": ["a"], "training": ["b"], "rows": tuned,
            },
        },
    }  # fmt: skip


@pytest.mark.parametrize(
    ("gain", "outcome"), [(20, verdicts.WINS), (-20, verdicts.LOSES), (0, verdicts.EVEN)]
)
@pytest.mark.parametrize("part", verdicts.PARTS)
def test_a_verdict_follows_from_the_figures(part: str, gain: float, outcome: str) -> None:
    assert verdicts.VERDICTS[part](made_up(gain)["parts"][part]).outcome == outcome


def test_one_more_random_extractor_neither_wins_nor_loses() -> None:
    random = [0.50, 0.52, 0.54]  # deviation 0.02, t 4.30, so 0.0993 either way
    assert [verdicts.against(0.52 + d, random, 0) for d in (0.099, 0.1, -0.099, -0.1)] == [
        verdicts.EVEN, verdicts.WINS, verdicts.EVEN, verdicts.LOSES,
    ]  # fmt: skip
    assert verdicts.against(0.6, [0.5, 0.5], 0.2) == verdicts.EVEN  # within the margin
    assert verdicts.against(0.9, [0.5], 0) == verdicts.EVEN  # one says nothing
    assert verdicts.consistent([0.1, 0.1, 0.5], 1) == verdicts.EVEN
    assert verdicts.consistent([0.1, 0.11, 0.12], -1) == verdicts.LOSES
    outcomes = [verdicts.WINS, verdicts.EVEN], [verdicts.WINS, verdicts.LOSES], [verdicts.EVEN]
    assert [verdicts.together(o) for o in outcomes] == [verdicts.WINS, verdicts.EVEN, verdicts.EVEN]


def test_t_is_students() -> None:
    """Its two-sided 95 % quantiles, by the distribution's own integral for two degrees of freedom
    and against a simulation for five."""
    assert verdicts.student(3) == pytest.approx(0.95 * math.sqrt(2 / (1 - 0.95**2)), abs=0.005)
    x = torch.randn(200_000, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = x.mean(1) / (x.std(1) / 6**0.5)
    assert float((t.abs() > verdicts.student(6)).double().mean()) == pytest.approx(0.05, abs=0.003)
    assert verdicts.student(100) == verdicts.STUDENT[-1]


def test_the_headline_does_not_hide_a_loss() -> None:
    lost, won = (
        {part: verdicts.VERDICTS[part](made_up(gain)["parts"][part]) for part in verdicts.PARTS}
        for gain in (-20, 20)
    )
    text = verdicts.headline(lost)
    assert "wins 0 of 4 measured parts, loses 4 (retrieval, inversion," in text
    assert "do not get better by it" in text
    assert "wins 4 (retrieval" in verdicts.headline(won)
    assert "do not get better" not in verdicts.headline(won)
    mixed = won | {"fine-tuning": lost["fine-tuning"]}
    assert "do not get better by it" in verdicts.headline(mixed)


PAGE = "".join(
    f"<!-- extractor: {kind} -->\nold\n<!-- extractor: end -->\n" for kind in page.BLOCKS
)


def test_the_page_is_a_function_of_the_result() -> None:
    result = made_up(20)
    source = f"before\n<!-- extractor: from none -->\n{PAGE}after\n"
    text = page.generate(source, result)
    assert text.startswith("before\n") and text.endswith("after\n") and "old\n" not in text
    assert "<!-- extractor: from toy-2c-extractor.json -->" in text
    assert text == page.generate(text, result)
    assert "| trained | 92.0 | 92.0 | 92.0 | 92.0 | 92.0 | 92.0 |" in text
    assert "| random | 52.0 (50.0 to 54.0) |" in text
    assert "**retrieval** (wins): without colour, neighbour of the same region 92.0 %" in text
    assert "more than 1 of 2 layers of VGG-16's layout" in text
    assert "trained, gradient matched, less random |  | +0.204 (0.004)" in text
    assert "| random | 0.600 (0.100 to 1.100) |" in text and "1/4 to 1/2" in text
    assert "(loses)" in page.generate(source, made_up(-20))
    for name, svg in page.drawings(result).items():
        ElementTree.fromstring(svg)
        assert f'src="assets/{name}"' in text


def test_what_is_not_measured_is_said() -> None:
    partial = made_up(1)
    del partial["parts"]["fine-tuning"], partial["parts"]["sensitivity"]
    text = page.generate(PAGE, partial)
    assert text.count("Not measured yet.") == 2 and "* **fine-tuning**: not measured." in text
    assert set(page.drawings(partial)) == {"extractor-retrieval.svg"}
    assert page.generate(PAGE, None).count("Not measured yet.") == len(page.BLOCKS)


def test_the_committed_page_says_what_its_result_says() -> None:
    text = (ROOT / "docs" / "extractor.md").read_text()
    found = page.FROM.search(text)
    assert found is not None and {m[1] for m in page.BLOCK.findall(text)} == set(page.BLOCKS)
    path = RESULTS / found[1]
    result = json.loads(path.read_text()) if path.exists() else None
    assert result is not None or found[1] == "none"
    assert page.generate(text, result) == text, "python -m benchmarks.extractor --report"
    for name, svg in page.drawings(result or {"parts": {}}).items():
        assert (ROOT / "docs" / "assets" / name).read_text() == svg, name


# ---- the command ---------------------------------------------------------------------------------


TINY = command.Sizes(2, 1, 1, 1, 1, 2, 2, 1, 2, 96, DemoSettings(steps=1, pretrain_steps=1))


def test_a_part_on_the_bundled_photographs(trained: DetailFeatureExtractor) -> None:
    part, files = command.run_part("inversion", trained, TINY)
    assert part["photographs"] == ["astronaut"] and part["side"] == 64
    assert set(files) == {"extractor-inversion.png"}
    windows = scenes.busiest(scenes.photographs(2), 96)
    assert [w.name for w in windows] == ["astronaut", "chelsea"]
    assert all(w.image.shape == (3, 96, 96) for w in windows)


def test_the_command_merges_and_writes(
    trained: DetailFeatureExtractor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    parts = json.loads(json.dumps(made_up(20)["parts"]))
    monkeypatch.setattr(
        command,
        "run_part",
        lambda part, *rest: (parts[part], {f"{part}.png": b"png"} if part == "inversion" else {}),
    )
    weights, out = tmp_path / "tiny.safetensors", tmp_path / "out"
    trained.save_pretrained(weights)
    committed = (ROOT / "docs" / "extractor.md").read_text()

    def run(*words: str) -> tuple[int, str]:
        code = command.main(["--weights", str(weights), "--out", str(out), *words])
        return code, capsys.readouterr().out

    code, told = run("--only", "retrieval")
    assert code == 0 and "* **retrieval** (wins)" in told and "**inversion**: not measured." in told
    (file,) = out.glob("*-extractor.json")
    first = json.loads(file.read_text())
    assert first["weights"]["sha256"] == subjects.digest(trained)
    assert str(tmp_path) not in file.read_text()

    code, told = run("--only", "inversion")
    both = json.loads(file.read_text())
    assert code == 0 and both["parts"] == {k: parts[k] for k in ("retrieval", "inversion")}
    assert "* **sensitivity**: not measured." in (out / "extractor.md").read_text()
    assert (out / "assets" / "inversion.png").read_bytes() == b"png"
    assert (ROOT / "docs" / "extractor.md").read_text() == committed

    weights.unlink()
    subjects.random_extractor(trained, 5).save_pretrained(weights)
    code, told = run("--only", "inversion")
    assert "is of other weights" in told
    assert set(json.loads(file.read_text())["parts"]) == {"inversion"}


def test_bad_weights_leave_everything_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert command.main(["--weights", str(tmp_path / "no.safetensors"), "--out", str(out)]) == 2
    assert "no.safetensors" in capsys.readouterr().err and not out.exists()


def test_a_quick_run_stays_out_of_the_results() -> None:
    quick, whole = command.target(None, True), command.target(None, False)
    assert whole.result.parent == RESULTS and whole.page == ROOT / "docs" / "extractor.md"
    assert ROOT / "build" in quick.result.parents and quick.page != whole.page
