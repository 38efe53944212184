"""The detail feature extractor: sizes, options, inverse, files."""

from __future__ import annotations

from pathlib import Path

import contract
import draws
import pytest
import torch
from torch import Tensor

from mghf_fast import DetailFeatureExtractor, use_backend
from mghf_fast.nn import InvertibleBlock, PatchProjection


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_parameter_counts() -> None:
    assert count(InvertibleBlock(128)) == 69_120
    assert count(DetailFeatureExtractor()) == 72_704
    assert count(DetailFeatureExtractor(stem="residual")) == 152_064 + 69_120


def test_parameter_names() -> None:
    names = {name for name, _ in DetailFeatureExtractor(blocks=2).named_parameters()}
    for expected in (
        "stem.weight",
        "blocks.0.mix.weight",
        "blocks.1.phi.expand.weight",
        "blocks.1.rho.depthwise.weight",
        "blocks.0.eta.project.weight",
    ):
        assert expected in names


@pytest.mark.parametrize("init", ["curved", "linear"])
@pytest.mark.parametrize("stem", ["conv", "residual"])
@pytest.mark.parametrize("subnet", ["bottleneck", "conv2"])
@pytest.mark.parametrize("in_channels", [1, 3, 4])
def test_options(init: str, stem: str, subnet: str, in_channels: int) -> None:
    extractor = DetailFeatureExtractor(in_channels, 8, 2, stem, subnet, "softplus", init=init)
    image = draws.randn(2, in_channels, 9, 7)
    features = extractor(image)
    assert features.shape == (2, 8, 9, 7)
    assert extractor.invertibility_error(image) < 1e-4


def test_memory_modes_agree() -> None:
    recompute = DetailFeatureExtractor(3, 8, 2)
    store = DetailFeatureExtractor(3, 8, 2, memory="store")
    store.load_state_dict(recompute.state_dict())
    image = draws.randn(1, 3, 8, 8)
    upstream = draws.randn(1, 8, 8, 8)
    grads = []
    for extractor in (recompute, store):
        (extractor(image) * upstream).sum().backward()
        grads.append([p.grad for p in extractor.parameters()])
    for a, b in zip(*grads, strict=True):
        assert a is not None and b is not None
        assert contract.relative_error(a, b) < 1e-5
    with use_backend("cpu"), pytest.raises(RuntimeError, match="only 'reference' stores"):
        store(image)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_drawing_in_the_stem_changes_nothing(dtype: torch.dtype) -> None:
    extractor = DetailFeatureExtractor(3, 8, 2).to(dtype)
    image = draws.randn(2, 3, 9, 70, dtype=dtype, requires_grad=True)
    plain = extractor.stem(image)
    for block in extractor.blocks:
        plain = block(plain)
    features = extractor(image)
    upstream = draws.randn_like(features)
    leaves = [image, *extractor.parameters()]
    expected = torch.autograd.grad(plain, leaves, upstream)
    assert contract.relative_error(features, plain) <= 1e-5
    for got, want in zip(torch.autograd.grad(features, leaves, upstream), expected, strict=True):
        assert contract.relative_error(got, want) <= 1e-4


def test_a_frozen_extractor_keeps_nothing_but_the_image() -> None:
    extractor = DetailFeatureExtractor(3, 8).requires_grad_(False)
    kept: list[Tensor] = []
    image = draws.randn(1, 3, 32, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        extractor(image)
    assert [t.shape for t in kept if t.shape[-2:] == (32, 32)] == [image.shape]


def test_frozen_extractor_still_passes_gradient_to_the_image() -> None:
    extractor = DetailFeatureExtractor(3, 8).requires_grad_(False)
    image = draws.randn(1, 3, 8, 8, requires_grad=True)
    extractor(image).square().sum().backward()
    assert image.grad is not None and image.grad.abs().sum() > 0


def test_orthogonal_mix() -> None:
    mix = InvertibleBlock(16).mix.weight.detach().flatten(1)
    torch.testing.assert_close(mix @ mix.mT, torch.eye(16), atol=1e-5, rtol=0)


def test_compiles_whole() -> None:
    extractor = DetailFeatureExtractor(3, 8, 2).requires_grad_(False)
    contract.check_compiled(extractor, draws.randn(1, 3, 8, 8))


def test_saved_and_loaded(tmp_path: Path) -> None:
    extractor = DetailFeatureExtractor(4, 8, 2, "residual", "conv2", "leaky_relu", clamp=2.0)
    path = tmp_path / "extractor.safetensors"
    extractor.save_pretrained(path)
    loaded = DetailFeatureExtractor.from_pretrained(path)
    assert loaded.config == extractor.config
    image = draws.randn(1, 4, 8, 8)
    assert torch.equal(loaded.eval()(image), extractor.eval()(image))
    with pytest.raises(FileExistsError, match="exists already"):
        extractor.save_pretrained(path)


def test_only_whole_safetensors_files_load(tmp_path: Path) -> None:
    load = DetailFeatureExtractor.from_pretrained
    extractor = DetailFeatureExtractor(3, 8)
    path = tmp_path / "extractor.safetensors"
    extractor.save_pretrained(path)

    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load(truncated)

    pickled = tmp_path / "extractor.pt"
    torch.save(extractor.state_dict(), pickled)
    with pytest.raises(ValueError, match=r"must be a \.safetensors file"):
        load(pickled)
    with pytest.raises(ValueError, match=r"must be a \.safetensors file.*got 'imagenet-v1'"):
        load("imagenet-v1")
    with pytest.raises(FileNotFoundError, match="is not a file"):
        load(tmp_path / "absent.safetensors")
    with pytest.raises(ValueError, match=r"path must end in \.safetensors"):
        extractor.save_pretrained(tmp_path / "extractor.bin")

    from safetensors.torch import save_file

    other = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(2)}, other)
    with pytest.raises(ValueError, match="holds no mghf_fast extractor"):
        load(other)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="channels must be an even number, 2 or more, got 7"):
        DetailFeatureExtractor(channels=7)
    with pytest.raises(ValueError, match="one of 'conv', 'residual', 'squeeze', got 'resnet'"):
        DetailFeatureExtractor(stem="resnet")
    with pytest.raises(ValueError, match="memory must be one of 'recompute', 'store'"):
        DetailFeatureExtractor(memory="invert")
    with pytest.raises(ValueError, match="image must have 3 channels, got 4"):
        DetailFeatureExtractor(3, 8)(draws.rand(1, 4, 8, 8))
    with pytest.raises(ValueError, match="blocks must be at least 1, got 0"):
        DetailFeatureExtractor(blocks=0)


def test_projection_is_the_same_in_every_process_and_frozen() -> None:
    a, b = PatchProjection(8, 4), PatchProjection(8, 4)
    assert torch.equal(a.hidden.weight, b.hidden.weight)
    assert not any(p.requires_grad for p in a.parameters())
    state = torch.random.get_rng_state()
    PatchProjection(8, 4)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_trainable_projection_gets_gradients() -> None:
    projection = PatchProjection(8, 4, trainable=True)
    y: Tensor = projection(draws.randn(1, 2, 16, 16))
    (y * draws.randn_like(y)).sum().backward()
    assert all(p.grad is not None for p in projection.parameters())


def test_every_block_takes_the_backend() -> None:
    extractor = DetailFeatureExtractor(3, 4, blocks=2)
    with use_backend("cuda"):
        extractor(draws.rand(1, 3, 5, 6), backend="reference")


def test_features_are_channels_last_on_the_cpu() -> None:
    features = DetailFeatureExtractor(3, 4)(draws.rand(2, 3, 5, 6))
    assert features.is_contiguous(memory_format=torch.channels_last)
