"""Properties on which training code written for another loss relies: the order of the arguments,
values from configuration files, weights that do not change, precisions, what a log shows."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import draws
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mghf_fast
from mghf_fast import (
    ContentStyleLoss,
    DECLoss,
    DetailFeatureExtractor,
    HFDiffLoss,
    LocalInformationLoss,
    MGHFLoss,
    functional,
)
from mghf_fast.losses import Preset, frozen
from mghf_fast.losses.distillation import distillation_terms


def small(**options: Any) -> DetailFeatureExtractor:
    torch.manual_seed(0)
    return DetailFeatureExtractor(3, 8, **options)


def small_loss(**options: Any) -> MGHFLoss:
    return MGHFLoss(**{"extractor": small(), **options})


def pair(b: int = 2, size: int = 48) -> tuple[Tensor, Tensor]:
    gt = draws.rand(b, 3, size, size)
    return (gt + 0.1 * draws.randn_like(gt)).clamp(0, 1), gt


# ---- order ----


def pairs() -> dict[str, Callable[[Tensor, Tensor], Any]]:
    """Every public loss of a pair in which only one side gets the gradient."""
    f = functional
    return {
        "MGHF-c": small_loss(),
        "MGHF-n": small_loss(variant="n"),
        "terms": small_loss().terms,
        "HFDiffLoss": HFDiffLoss(small()),
        "DECLoss": DECLoss(),
        "ContentStyleLoss": ContentStyleLoss(),
        "LocalInformationLoss": LocalInformationLoss(),
        "content_style_terms": lambda sr, gt: f.content_style_terms(gt=gt, sr=sr),
        "naive_term": lambda sr, gt: f.naive_term(gt=gt, sr=sr),
        "dec_loss": f.dec_loss,
        "monce_loss": lambda sr, gt: f.monce_loss(sr[0], gt[0]),
        "patch_nce_loss": lambda sr, gt: f.patch_nce_loss(sr[0], gt[0]),
    }


@pytest.mark.parametrize("name", pairs())
def test_swapped_arguments_are_refused(name: str) -> None:
    """LPIPS's callers may pass the ground truth first; the gradient would be lost silently."""
    loss, (sr, gt) = pairs()[name], pair()
    message = "(gt|key) requires a gradient and (sr|query) does not.*(sr|query) first"
    with pytest.raises(ValueError, match=message):
        loss(gt, sr.clone().requires_grad_())
    with torch.no_grad():
        loss(gt, sr.clone().requires_grad_())  # nothing to lose
    loss(sr.clone().requires_grad_(), gt.clone().requires_grad_())  # as in a cycle


def test_features_are_taken_by_keyword_only() -> None:
    sr, gt = pair()
    for function in (functional.content_style_terms, functional.naive_term):
        with pytest.raises(TypeError, match="positional"):
            function(gt, sr)  # type: ignore[misc]


# ---- configuration files ----


class ListConfig(Sequence[Any]):
    """A custom type of sequence, as in configuration libraries."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __getitem__(self, index: Any) -> Any:
        return self.values[index]

    def __len__(self) -> int:
        return len(self.values)


@pytest.mark.parametrize("preset", [2026, "2026", np.int64(2026)])
def test_a_preset_may_be_a_number(preset: Any) -> None:
    assert small_loss(preset=preset).preset == mghf_fast.losses.PRESETS["2026"]


@pytest.mark.parametrize("preset", [2024, True, None, [2026], 2026.5])
def test_other_presets_are_refused(preset: Any) -> None:
    with pytest.raises(ValueError, match="preset must be one of 'balanced', '2026', '2025', got"):
        small_loss(preset=preset)


@pytest.mark.parametrize(
    "value",
    ["0,1", "0, 1", "[0, 1]", "(0,1)", [0, 1], (0.0, 1.0), ListConfig(0, 1), np.array([0, 1])],
)
def test_ways_to_write_a_range(value: Any) -> None:
    assert small_loss(input_range=value).input_range == "0,1"
    assert HFDiffLoss(small(), input_range=value).perceptual.input_range == "0,1"


def test_the_other_ranges() -> None:
    assert small_loss(input_range=[-1, 1]).input_range == "-1,1"
    assert small_loss(input_range=None).input_range is None
    for bad in ("0,255", [0, 255], [0, 1, 2], 1, "", {"0": None}):
        with pytest.raises(ValueError, match="input_range must be one of None, '0,1', '-1,1'"):
            small_loss(input_range=bad)


@pytest.mark.parametrize("kind", [str, Path])
def test_an_extractor_may_be_a_path(kind: Callable[[Path], Any], tmp_path: Path) -> None:
    own, path = small(), tmp_path / "own.safetensors"
    own.save_pretrained(path)
    sr, gt = pair()
    assert torch.equal(MGHFLoss(extractor=kind(path))(sr, gt), MGHFLoss(extractor=own)(sr, gt))
    with pytest.raises(FileNotFoundError, match="not a file"):
        MGHFLoss(extractor=kind(tmp_path / "none.safetensors"))
    with pytest.raises(ValueError, match=r"\.safetensors"):
        MGHFLoss(extractor=kind(tmp_path / "own.pth"))


def test_a_frozen_extractor_can_be_saved(tmp_path: Path) -> None:
    loss, path = small_loss(), tmp_path / "kept.safetensors"
    assert isinstance(loss.extractor, DetailFeatureExtractor)
    loss.extractor.save_pretrained(path)
    assert path.read_bytes() == small().to_safetensors()


def test_numbers_of_numpy_and_sequences_of_configuration_libraries() -> None:
    sr, gt = pair()
    plain = Preset((1.0, 2.0, 0.5), (0.5, 0.5, 0.5), 1.1, 1.5, 24)
    numpy = Preset(
        np.array([1.0, 2.0, 0.5]),  # type: ignore[arg-type]
        ListConfig(*np.float32([0.5, 0.5, 0.5])),  # type: ignore[arg-type]
        np.float64(1.1),
        np.float32(1.5),
        np.int32(24),  # type: ignore[arg-type]
    )
    expected = small_loss(preset=plain, top_m=3, patch_size=32)
    got = small_loss(preset=numpy, top_m=np.int64(3), patch_size=np.int64(32))
    assert torch.equal(got(sr, gt), expected(sr, gt))
    assert torch.equal(
        DECLoss(np.float32(0.5), temperatures=ListConfig(0.5, 1.5), patch_size=np.int8(8))(sr, gt),
        DECLoss(0.5)(sr, gt),
    )
    ContentStyleLoss(ListConfig(1, 0, 0), bins=np.int64(64))(sr, gt)  # type: ignore[arg-type]
    LocalInformationLoss(iterations=np.int64(3), epsilon=np.float32(0.5))(sr, gt)
    HFDiffLoss(small(), eta1=np.float32(0.2))(sr, gt)
    functional.channel_entropy(gt, np.int64(16))
    DetailFeatureExtractor(np.int64(3), np.int64(8), blocks=np.int8(2))(gt)
    for bad in (np.bool_(True), "3", np.float32(3)):
        with pytest.raises(TypeError, match="top_m must be an integer"):
            small_loss(top_m=bad)


# ---- frozen weights ----


class Parent(nn.Module):
    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.net, self.loss = nn.Conv2d(3, 3, 3, padding=1), loss


def foreign() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.Conv2d(8, 8, 1)
    )


def losses() -> dict[str, nn.Module]:
    return {
        "default": MGHFLoss(),
        "conv": MGHFLoss(extractor="random"),
        "foreign": MGHFLoss(extractor=foreign()),
        "script": MGHFLoss(extractor=torch.jit.script(foreign())),
        "hf": HFDiffLoss(),
        "local": LocalInformationLoss(),
        "dec": DECLoss(),
    }


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("name", losses())
def test_nothing_unfreezes_the_weights(name: str) -> None:
    loss, (sr, gt) = losses()[name], pair()
    before = loss(sr, gt)
    parent = Parent(loss)
    parent.requires_grad_(True).train()
    assert {name.split(".")[0] for name, _ in parent.named_parameters()} == {"net"}
    assert set(parent.state_dict()) == {"net.weight", "net.bias"}
    optimizer = torch.optim.AdamW(parent.parameters(), lr=1e-1, weight_decay=0.5)
    loss(parent.net(sr), gt).backward()
    optimizer.step()
    assert torch.equal(loss(sr, gt), before)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("name", losses())
def test_the_weights_follow(name: str) -> None:
    """A copy, a pickle, a file, a cast, a device."""
    loss, (sr, gt) = losses()[name], pair()
    expected = loss(sr, gt)
    file = io.BytesIO()
    torch.save(loss, file)
    file.seek(0)
    for other in (
        copy.deepcopy(loss),
        pickle.loads(pickle.dumps(loss)),
        torch.load(file, weights_only=False),
    ):
        assert torch.equal(other(sr, gt), expected)
        assert not list(other.parameters())
    # PyTorch's convolutions of a foreign extractor round differently then.
    other = copy.deepcopy(loss).to(memory_format=torch.channels_last)
    torch.testing.assert_close(other(sr, gt), expected, rtol=1e-6, atol=0)
    assert not list(other.parameters())
    exact = copy.deepcopy(loss).double()(sr.double(), gt.double())
    assert exact.dtype == torch.float64
    torch.testing.assert_close(exact.float(), expected, rtol=1e-3, atol=1e-5)


def replica(module: nn.Module) -> nn.Module:
    """A module as replicated by DataParallel on a second device: plain tensors in place of
    parameters, and copies of the buffers."""
    copies = {m: m._replicate_for_data_parallel() for m in module.modules()}
    for m, twin in copies.items():
        for name, child in m._modules.items():
            twin._modules[name] = None if child is None else copies[child]
        for name, p in m._parameters.items():
            if p is not None:
                setattr(twin, name, p.detach().clone())
        for name, b in m._buffers.items():
            twin._buffers[name] = None if b is None else b.clone()
    return copies[module]


class Wavelet(nn.Module):
    """An extractor with only a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kernel", torch.linspace(-1, 1, 8 * 27).view(8, 3, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.kernel, padding=1)


class Shift(nn.Module):
    """An extractor without any tensor."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, x.roll(1, 2) - x), 1)


EXTRACTORS = {
    "default": lambda: None,
    "conv": foreign,
    "buffers": Wavelet,
    "nothing": Shift,
    "script": lambda: torch.jit.script(foreign()),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("name", EXTRACTORS)
@pytest.mark.parametrize("replicated", [False, True])
def test_float32_under_autocast_whatever_the_extractor_is_made_of(
    name: str, replicated: bool
) -> None:
    loss, (sr, gt) = MGHFLoss(extractor=EXTRACTORS[name]()), pair()
    sr = sr.bfloat16()
    expected = loss(sr.float(), gt)
    run = replica(loss) if replicated else loss
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(sr, gt), expected)
    assert torch.equal(run(sr, gt.half()), loss(sr.float(), gt.half().float()))


def test_a_replicas_first_look_at_the_range_is_the_only_one() -> None:
    loss, (sr, gt) = small_loss(input_range="0,1"), pair()
    replica(loss)(sr, gt)
    assert not loss._range_unchecked


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "parametrized"])
def test_extractors_with_reparametrized_weights(kind: str) -> None:
    """Old-style norms leave a tensor with a history on the module, which deepcopy refuses."""
    convolution = nn.Conv2d(3, 8, 3, padding=1)
    wrap = {
        "weight_norm": nn.utils.weight_norm,
        "spectral_norm": nn.utils.spectral_norm,
        "parametrized": nn.utils.parametrizations.weight_norm,
    }[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        network = nn.Sequential(wrap(convolution), nn.ReLU())
    sr, gt = pair()
    network(sr)  # used once
    loss = MGHFLoss("n", extractor=network)
    network.eval()
    expected = (network(sr) - network(gt)).square().mean()
    torch.testing.assert_close(loss(sr, gt), expected.detach())
    assert not list(loss.parameters())


@pytest.mark.parametrize("input_range", [None, "0,1"])
def test_an_extractor_that_works_in_place_leaves_the_images_alone(input_range: str | None) -> None:
    class Normalize(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat((x.sub_(0.5), x), 1)

    sr, gt = pair()
    before = sr.clone(), gt.clone()
    loss = MGHFLoss(extractor=Normalize(), input_range=input_range)
    leaf = sr.requires_grad_()
    loss(leaf, gt).backward()
    assert torch.equal(leaf, before[0]) and torch.equal(gt, before[1])

    hf = HFDiffLoss(small(), embedder=lambda x: x.sub_(0.5).flatten(1))
    hf(leaf, gt).backward()
    assert torch.equal(leaf, before[0]) and torch.equal(gt, before[1])


def old_state(loss: nn.Module) -> dict[str, Tensor]:
    """The state_dict of a loss whose weights were parameters."""
    return {
        name: tensor.clone()
        for name, tensor in loss.named_buffers()
        if not name.rpartition(".")[2].startswith("_")
    }


def test_a_checkpoint_with_the_losss_weights_loads() -> None:
    parent = Parent(MGHFLoss())
    old = {**parent.net.state_dict(prefix="net."), **old_state(parent)}
    assert "loss.extractor.stem.lift.weight" in old
    assert "loss.local_information.projections.32.hidden.weight" in old
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert parent.load_state_dict(old).missing_keys == []
    assert set(old) > set(parent.state_dict())  # the loaded state_dict does not change


def test_a_checkpoint_of_another_extractor_is_told() -> None:
    loss, (sr, gt) = MGHFLoss("n", extractor="procedural-v1"), pair()
    expected = loss(sr, gt)
    # Same shapes, other values; and other shapes.
    for other in (MGHFLoss("n", extractor="random"), MGHFLoss("n")):
        with pytest.warns(UserWarning, match="other frozen weights.*'extractor"):
            loss.load_state_dict(old_state(other))
    assert torch.equal(loss(sr, gt), expected)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        loss.load_state_dict({"something": torch.zeros(1)})


def test_weights_are_saved_if_asked_for() -> None:
    loss = small_loss(save_weights=True)
    assert "extractor.stem.weight" in loss.state_dict()
    assert not list(loss.parameters())
    other = MGHFLoss(extractor=DetailFeatureExtractor(3, 8), save_weights=True)
    sr, gt = pair()
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other(sr, gt), loss(sr, gt))


def test_a_trainable_projection_stays_a_parameter() -> None:
    local = LocalInformationLoss(trainable_projection=True)
    assert sum(p.requires_grad for p in local.parameters()) == 4
    assert len(local.state_dict()) == 4


# ---- types ----


@pytest.mark.parametrize("name", pairs())
def test_two_floating_types_are_promoted(name: str) -> None:
    loss, (sr, gt) = pairs()[name], pair()
    sr = sr.half().requires_grad_()

    def total(x: Any) -> Tensor:
        if isinstance(x, dict):
            return x["total"]
        return sum(t.sum() for t in x) if isinstance(x, tuple) else x.sum()

    got = total(loss(sr, gt))
    torch.testing.assert_close(got, total(loss(sr.float(), gt)), rtol=1e-6, atol=0)
    (grad,) = torch.autograd.grad(got, sr)
    assert grad.dtype == torch.float16


def test_divergences_of_two_types() -> None:
    p, q = draws.randn(2, 3, 5)
    expected = functional.js_divergence_loss(p.half().float(), q)
    assert torch.equal(functional.js_divergence_loss(p.half(), q), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_losses_can_be_made_under_another_default_type(dtype: torch.dtype) -> None:
    sr, gt = pair()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        made = [MGHFLoss(), MGHFLoss(extractor="random"), MGHFLoss(extractor=foreign())]
        linear = DetailFeatureExtractor(3, 8, init="linear")
        squeezed = DetailFeatureExtractor(3, 48, stem="squeeze")
    finally:
        torch.set_default_dtype(torch.float32)
    for extractor in (linear, squeezed):
        assert extractor(gt.to(dtype)).isfinite().all()
    for loss, plain in zip(made, (MGHFLoss(), MGHFLoss(extractor="random")), strict=False):
        assert next(loss.extractor.buffers()).dtype == dtype
        a, b = (dict(x.named_buffers()) for x in (loss, plain))
        for name in a:  # the same numbers, rounded
            if name.startswith("extractor"):
                assert torch.equal(a[name], b[name].to(dtype))
        assert loss(sr, gt).isfinite()


def test_on_the_meta_device() -> None:
    with torch.device("meta"):
        loss = MGHFLoss(input_range="0,1")
        sr, gt = draws.rand(2, 2, 3, 64, 64)
    sr.requires_grad_()
    value = loss(sr, gt)
    value.backward()
    assert value.device.type == "meta" and sr.grad is not None and "on meta" in repr(loss)


def test_trace() -> None:
    """TensorBoard's add_graph uses it."""
    a, b = pair(1)
    for loss in (MGHFLoss(), small_loss(), small_loss(variant="n"), DECLoss(), HFDiffLoss(small())):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(loss, (a, b))
            torch.testing.assert_close(traced(b, a), loss(b, a))


# ---- what a log shows ----


def test_repr_says_what_the_loss_is(tmp_path: Path) -> None:
    text = repr(MGHFLoss(input_range="0,1"))
    assert "\n" not in text
    for part in (
        "variant='c'",
        "preset=balanced",
        "'perceptual-v1' (weights ",
        "(0.28, 1.0, 0.008)",
    ):
        assert part in text
    assert "input_range='0,1'" in text
    digests = {frozen.digest(MGHFLoss(extractor=e).extractor) for e in (None, "random", small())}
    assert len(digests) == 3
    assert frozen.digest(small()) == frozen.digest(small_loss().extractor)  # wherever it is kept
    assert "preset" not in repr(MGHFLoss("n"))
    assert "weight=0.01" in repr(DECLoss(0.01)) and "eta1=0.2" in repr(HFDiffLoss())
    assert "betas=" in repr(ContentStyleLoss()) and "stride=24" in repr(LocalInformationLoss())


# ---- weights of the terms that change ----


def test_gammas_can_be_set_between_steps() -> None:
    sr, gt = pair()
    late = Preset((1.0, 2.0, 0.5), (0.5, 0.5, 0.5), 1.1, 1.5, 24)
    loss = small_loss(preset=Preset((1.0, 2.0, 0.0), (0.5, 0.5, 0.5), 1.1, 1.5, 24))
    assert "lip" not in loss.terms(sr, gt)
    loss.gammas = [1, np.float32(2), 0.5]
    assert loss.gammas == (1.0, 2.0, 0.5) and "gammas=(1.0, 2.0, 0.5)" in repr(loss)
    assert torch.equal(loss(sr, gt), small_loss(preset=late)(sr, gt))
    half = copy.deepcopy(loss).half()
    assert torch.equal(half._gamma_tensor, torch.tensor(loss.gammas, dtype=torch.float64))
    for bad in ((1, 2), (1, 2, float("nan")), "abc"):
        with pytest.raises((TypeError, ValueError), match="gammas must be"):
            loss.gammas = bad  # type: ignore[assignment]
    assert loss.gammas == (1.0, 2.0, 0.5)


def test_a_local_term_whose_patches_do_not_fit_can_be_left_out_but_not_switched_on() -> None:
    preset = Preset((1.0, 0.0, 0.0), (0.0, 0.0, 0.0), 1.1, 1.5, 22)
    loss = MGHFLoss(preset=preset, extractor=DetailFeatureExtractor(3, 48, stem="squeeze"))
    with pytest.raises(ValueError, match="multiples of the extractor's downscale 4"):
        loss.gammas = (1.0, 0.0, 1.0)


def test_new_gammas_compile_nothing_anew() -> None:
    loss, (sr, gt) = small_loss(), pair()
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend=backend, fullgraph=True)
    for gammas in ((0.28, 1, 8e-3), (0.5, 0.5, 0.5), (2.0, 3.0, 0.25)):
        loss.gammas = gammas
        # The terms are added up in another order.
        torch.testing.assert_close(compiled(sr, gt), loss(sr, gt), rtol=1e-6, atol=0)
    assert len(graphs) == 1
    loss.gammas = (1.0, 1.0, 0.0)  # a term less
    torch.testing.assert_close(compiled(sr, gt), loss(sr, gt), rtol=1e-6, atol=0)
    assert len(graphs) == 2


# ---- HF-Diff ----


def test_one_value_per_image() -> None:
    embedder = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(1))
    each = HFDiffLoss(small(), embedder, reduction="none")
    mean = HFDiffLoss(small(), embedder)
    conv = nn.Conv2d(3, 3, 3, padding=1)

    def student(x: Tensor, y: Tensor, timestep: int) -> Tensor:
        return conv(x) * (1 + timestep) + y

    noisy, condition, teacher, gt = draws.rand(4, 2, 3, 48, 48)
    terms = distillation_terms(student, noisy, condition, teacher, gt, 3, reduction="none")
    assert [t.shape for t in terms[:3]] == [(2,)] * 3
    values = each.terms(terms.sr, gt, terms)
    assert all(value.shape == (2,) for value in values.values())
    for name, value in mean.terms(terms.sr, gt, terms).items():
        torch.testing.assert_close(values[name].mean(), value)
    torch.testing.assert_close(
        each.distil(student, noisy, condition, teacher, gt, 3), values["total"]
    )
    alone = torch.cat([each(terms.sr[i : i + 1], gt[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(alone, each(terms.sr, gt))
    scalars = distillation_terms(student, noisy, condition, teacher, gt, 3)
    with pytest.raises(ValueError, match=r"distillation.distill must have shape \(2,\)"):
        each(terms.sr, gt, scalars)
    with pytest.raises(ValueError, match="reduction must be one of 'mean', 'none'"):
        HFDiffLoss(reduction="sum")


def test_the_embedder_stays_in_evaluation_mode() -> None:
    embedder = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.BatchNorm1d(3 * 48 * 48))
    loss = HFDiffLoss(small(), embedder)
    sr, gt = pair()
    before = loss.terms(sr, gt)["js"]
    nn.ModuleList([loss]).train()
    assert torch.equal(loss.terms(sr, gt)["js"], before)
    assert loss.training and not embedder.training
