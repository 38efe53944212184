"""The papers' claims about information, in the form that holds: docs/theory.md names each test.

Float64 on the reference; images of one pixel make the invertible block a map of R^C.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from pathlib import Path

import draws
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mghf_fast import DetailFeatureExtractor, functional
from mghf_fast.nn import InvertibleBlock

Map = Callable[[Tensor], Tensor]


def block_of(channels: int, strength: float = 2.0, seed: int = 0, **options: object) -> Map:
    """A float64 block with couplings ``strength`` times as strong as at initialisation."""
    torch.manual_seed(seed)
    block = InvertibleBlock(channels, **options).double().requires_grad_(False)  # type: ignore[arg-type]
    torch.nn.init.orthogonal_(block.mix.weight)  # to the last digit of float64
    for subnet in (block.phi, block.rho, block.eta):
        for kernel in subnet.kernels():
            kernel *= strength
    return block


def on_points(block: Map, points: Tensor) -> Tensor:
    """The block as a map of points, (N, C) -> (N, C)."""
    return block(points[:, :, None, None]).flatten(1)


def jacobian_log_det(f: Map, x: Tensor) -> Tensor:
    """log |det| of the whole Jacobian of one image, by automatic differentiation."""
    jacobian = torch.autograd.functional.jacobian(f, x).view(x.numel(), x.numel())
    return torch.linalg.slogdet(jacobian).logabsdet


# ---- the block's determinant ---------------------------------------------------------------------


@pytest.mark.parametrize("subnet", ["bottleneck", "conv2"])
@pytest.mark.parametrize("activation", ["relu6", "softplus", "leaky_relu"])
@pytest.mark.parametrize("clamp", [None, 0.7])
def test_log_det_is_that_of_the_jacobian(subnet: str, activation: str, clamp: float | None) -> None:
    block = block_of(4, 3.0, subnet=subnet, activation=activation, clamp=clamp)
    block.mix.weight *= 1.3  # so that the mix takes part
    x = 2 * draws.randn(2, 4, 3, 2, dtype=torch.float64)
    log_det = block.log_det(x)
    expected = torch.stack([jacobian_log_det(block, image) for image in x.split(1)])
    torch.testing.assert_close(log_det, expected, rtol=1e-8, atol=1e-8)
    of_mix = 6 * torch.linalg.slogdet(block.mix.weight.flatten(1)).logabsdet
    assert (log_det - of_mix).abs().max() > 0.1  # and so do the couplings


def test_log_det_of_the_inverse_and_of_a_chain() -> None:
    """The inverse's has the opposite sign; those of a chain add up."""
    first, second = block_of(4, seed=1), block_of(4, seed=2)
    x = draws.randn(1, 4, 2, 2, dtype=torch.float64)
    y = first(x)
    torch.testing.assert_close(jacobian_log_det(first.inverse, y), -first.log_det(x)[0])
    torch.testing.assert_close(
        jacobian_log_det(lambda z: second(first(z)), x), (first.log_det(x) + second.log_det(y))[0]
    )


def test_log_det_is_differentiable() -> None:
    block = block_of(4, activation="softplus").requires_grad_()
    x = draws.randn(2, 4, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(block.log_det, x)
    block.log_det(x).sum().backward()
    assert block.mix.weight.grad is not None and block.rho.project.weight.grad is not None
    # d log|det W| / dW = W^-T, here for 2 images of 6 pixels, plus the part through rho.
    inverse = torch.linalg.inv(block.mix.weight.detach().flatten(1)).mT
    block.mix.weight.grad, block.rho.project.weight.data[:] = None, 0
    block.log_det(x).sum().backward()
    torch.testing.assert_close(block.mix.weight.grad.flatten(1), 12 * inverse)


def test_log_det_in_float32_and_bfloat16() -> None:
    block = InvertibleBlock(16).requires_grad_(False)
    x = draws.randn(2, 16, 24, 20)
    found = block.log_det(x)
    assert found.dtype == torch.float32 and found.shape == (2,)
    torch.testing.assert_close(
        found.double(), block.double().log_det(x.double()), rtol=1e-4, atol=1e-3
    )
    with torch.autocast("cpu"):
        torch.testing.assert_close(block.float().log_det(x), found)
    half = block.bfloat16().log_det(x.bfloat16())
    assert half.dtype == torch.float32 and torch.isfinite(half).all()


def test_log_det_refuses_what_has_none() -> None:
    block = InvertibleBlock(4).requires_grad_(False)
    x = draws.randn(1, 4, 3, 3)
    with pytest.raises(ValueError, match="x must have the block's 4 channels, got 6"):
        block.log_det(draws.randn(1, 6, 3, 3))
    with pytest.raises(TypeError, match="x must be a tensor of shape"):
        block.log_det([1.0])  # type: ignore[arg-type]
    block.mix.weight[3] = -2 * block.mix.weight[0]
    with pytest.raises(torch.linalg.LinAlgError, match="mix is singular: its singular values"):
        block.log_det(x)
    block.mix.weight.fill_(0)
    with pytest.raises(torch.linalg.LinAlgError, match="no inverse and no log determinant"):
        block.log_det(x)
    block.mix.weight.fill_(torch.nan)
    assert block.log_det(x).isnan().all()


# ---- entropy -------------------------------------------------------------------------------------


def nearest_neighbour_entropy(points: Tensor) -> float:
    """The estimator of Kozachenko and Leonenko, nats, from the points alone."""
    n, d = points.shape
    distance = torch.cdist(points, points).fill_diagonal_(torch.inf).amin(1)
    ball = d / 2 * math.log(math.pi) - math.lgamma(d / 2 + 1)
    return (
        d * float(distance.log().mean())
        + ball
        + math.log(n - 1)
        + float(-torch.digamma(torch.ones(())))
    )


GAUSSIAN_ENTROPY = math.log(2 * math.pi * math.e)
"""Entropy of the standard Gaussian in the plane, nats."""


@pytest.mark.parametrize("activation", ["relu6", "softplus"])
def test_entropy_change_is_the_mean_log_det(activation: str) -> None:
    """H(f(X)) = H(X) + E log |det| (MGHF eq. 29), against an estimate from samples of f(X)."""
    block = block_of(2, activation=activation)
    points = torch.randn(4000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    change = float(block.log_det(points[:, :, None, None]).mean())
    assert abs(change) > 0.2  # eq. 23 has it 0
    estimate = nearest_neighbour_entropy(on_points(block, points))
    assert nearest_neighbour_entropy(points) == pytest.approx(GAUSSIAN_ENTROPY, abs=0.05)
    assert estimate - GAUSSIAN_ENTROPY == pytest.approx(change, abs=0.05)


def test_entropy_by_quadrature_over_the_density_of_the_output() -> None:
    """The same without sampling: the density of Y = f(X), by change of variables on a grid in the
    plane, has mass 1 and the entropy given by the mean log determinant."""
    block = block_of(2, activation="softplus")
    points = torch.randn(50_000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    image = on_points(block, points)
    low, high = image.amin(0) - 1, image.amax(0) + 1
    axes = [
        torch.linspace(float(a), float(b), 500).double() for a, b in zip(low, high, strict=True)
    ]
    grid = torch.cartesian_prod(*axes)
    back = on_points(block.inverse, grid)
    log_density = -back.square().sum(1) / 2 - math.log(2 * math.pi)
    log_density = log_density - block.log_det(back[:, :, None, None])
    cell = math.prod(float(a[1] - a[0]) for a in axes)
    density = log_density.exp()
    assert float(density.sum()) * cell == pytest.approx(1, abs=2e-3)
    entropy = -float((density * log_density).sum()) * cell
    change = float(block.log_det(points[:, :, None, None]).mean())
    assert entropy - GAUSSIAN_ENTROPY == pytest.approx(change, abs=0.01)


def test_only_shears_and_volume_preserving_mixes_keep_differential_entropy() -> None:
    """The unit determinant that the paper's proof ends with is that of additive couplings (rho = 0)
    behind a mix with |det| = 1; an affine coupling or another mix changes the entropy."""
    x = draws.randn(5, 4, 3, 3, dtype=torch.float64)
    block = block_of(4, 3.0)
    assert block.log_det(x).abs().max() > 0.1
    block.rho.project.weight.fill_(0)
    torch.testing.assert_close(
        block.log_det(x), torch.zeros(5, dtype=torch.float64), atol=1e-12, rtol=0
    )
    block.mix.weight *= 2
    torch.testing.assert_close(block.log_det(x), torch.full((5,), 4 * 9 * math.log(2)).double())


LEVELS = 5
GRID = torch.tensor(list(itertools.product(range(LEVELS), repeat=4)), dtype=torch.float64)
"""Every 2 x 2 picture of five grey levels, each equally likely: entropy 4 ln 5."""


def discrete_entropy(values: Tensor) -> float:
    """Entropy of equally likely rows, nats. Rows count as different beyond rounding."""
    _, counts = torch.unique((values.flatten(1) * 1e9).round(), dim=0, return_counts=True)
    p = counts.double() / len(values)
    return float(-(p * p.log()).sum())


def test_max_pooling_loses_information() -> None:
    """The paper's toy: (4, 1, 2, 3) and (4, 0, 1, 2) both become 4; the loss, in nats."""
    toy = torch.tensor([[4.0, 1, 2, 3], [4.0, 0, 1, 2]])
    assert F.max_pool2d(toy.view(2, 1, 2, 2), 2).flatten().tolist() == [4, 4]

    before = discrete_entropy(GRID)
    assert before == pytest.approx(4 * math.log(LEVELS))
    after = discrete_entropy(F.max_pool2d(GRID.view(-1, 1, 2, 2), 2))
    p = [((m + 1) ** 4 - m**4) / LEVELS**4 for m in range(LEVELS)]
    assert after == pytest.approx(-sum(q * math.log(q) for q in p))
    # The loss is the conditional entropy given the maximum, sum p(m) ln(number of preimages).
    open_ = sum(q * math.log(q * LEVELS**4) for q in p)
    assert before - after == pytest.approx(open_) and open_ > 5


def test_injective_maps_keep_the_entropy_of_discrete_images() -> None:
    """H(f(X)) = H(X) of images with finitely many values, for the block as for any injection; ReLU
    and average pooling lose some."""
    everything = 4 * math.log(LEVELS)
    assert discrete_entropy(on_points(block_of(4, 3.0), GRID)) == pytest.approx(everything)
    assert discrete_entropy((GRID - 2).relu()) < everything - 1
    assert discrete_entropy(F.avg_pool2d(GRID.view(-1, 1, 2, 2), 2)) < everything - 1


def test_a_relu_network_can_be_injective() -> None:
    """Not every CNN loses information: stride-2 filters +d and -d at each of four positions, then
    ReLU, are undone by subtraction. What decides is injectivity, not the kind of layer."""
    picks = torch.eye(4).view(4, 1, 2, 2)
    image = draws.randn(3, 1, 8, 6)
    features = F.conv2d(image, torch.cat((picks, -picks)), stride=2).relu()
    positive, negative = features.chunk(2, 1)
    assert torch.equal(F.pixel_shuffle(positive - negative, 2), image)


def test_the_printed_loss_of_relu_is_none() -> None:
    """MGHF eq. 22 puts H(X) - H(relu(X)) at the integral of p ln p over the negative axis, "> 0".
    It is below 0 for the standard Gaussian, above 0 for one ten times as narrow: it depends on the
    unit of X. (relu(X) has an atom at 0, so its differential entropy is minus infinity.)"""
    x = torch.linspace(-12, 0, 200_001, dtype=torch.float64)
    for sigma, sign in ((1.0, -1), (0.1, 1)):
        p = torch.exp(-((x / sigma) ** 2) / 2) / (sigma * math.sqrt(2 * math.pi))
        printed = float(torch.trapezoid(torch.xlogy(p, p), x))
        assert printed == pytest.approx(-(math.log(2 * math.pi * sigma**2) + 1) / 4, abs=1e-6)
        assert printed * sign > 0


def test_the_extractor_keeps_what_its_stem_keeps() -> None:
    """image -> 128 maps is not a map of R^n to itself: it has a left inverse exactly if the stem
    has. Inverting the blocks gives the stem's features, the centre taps' pseudo-inverse the image.
    """
    extractor = DetailFeatureExtractor(3, 32, 2).double().requires_grad_(False)
    image = draws.rand(2, 3, 6, 5, dtype=torch.float64)

    def stem_features(x: Tensor) -> Tensor:
        y = extractor(x)
        for block in reversed(extractor.blocks):
            y = block.inverse(y)
        return y

    filters = extractor.stem.weight.flatten(1)  # (32, 27): each pixel's neighbourhood
    centre = torch.linalg.pinv(filters)[[4, 13, 22]]
    features = stem_features(image) - extractor.stem.bias.view(-1, 1, 1)
    found = F.conv2d(features, centre[:, :, None, None])
    torch.testing.assert_close(found, image, rtol=0, atol=1e-8)
    extractor.stem.weight.copy_(
        extractor.stem.weight.mean((1, 2, 3), keepdim=True).expand(-1, 3, 3, 3)
    )
    grey = image.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    torch.testing.assert_close(extractor(image), extractor(grey))


# ---- the toy transforms --------------------------------------------------------------------------


def swirl(points: Tensor, k: float = 0.7) -> Tensor:
    """(N, 2) rotated about the origin by k r^2."""
    angle = k * points.square().sum(1)
    x, y = points.unbind(1)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack((x * cos - y * sin, x * sin + y * cos), 1)


def collapse(points: Tensor) -> Tensor:
    return points * points.new_tensor([1.0, 0.0])


def test_swirl_keeps_noise_and_collapse_drops_it() -> None:
    """MGHF's Figure 11: noise across the axis of collapse costs nothing after collapsing, something
    after the swirl, which preserves areas (determinant 1) and is inverted by rotating back."""
    points = draws.randn(200, 2, dtype=torch.float64)
    noisy = points + 0.1 * draws.randn(200, 1, dtype=torch.float64) * points.new_tensor([0.0, 1.0])
    assert torch.equal(collapse(points), collapse(noisy))
    assert (swirl(points) - swirl(noisy)).norm(dim=1).min() > 0
    torch.testing.assert_close(swirl(swirl(points), -0.7), points)
    for point in points[:5]:
        assert abs(jacobian_log_det(swirl, point[None])) < 1e-10
        assert jacobian_log_det(collapse, point[None]) == -torch.inf


# ---- Proposition 1 -------------------------------------------------------------------------------


def distance_ratios(f: Map, count: int = 200) -> Tensor:
    a, b = draws.randn(2, count, 4, dtype=torch.float64)
    return (on_points(f, a) - on_points(f, b)).norm(dim=1) / (a - b).norm(dim=1)


def test_a_warp_of_the_domain_is_an_isometry_and_the_block_is_not() -> None:
    """The proposition's operator rearranges pixels like a permutation and preserves every distance:
    its loss *is* the MSE. The extractor is not such an operator."""
    f, g = draws.randn(2, 3, 8, 8, dtype=torch.float64)
    order = draws.randperm(64)
    warped = f.flatten(1)[:, order] - g.flatten(1)[:, order]
    torch.testing.assert_close(warped.norm(), (f - g).norm())
    ratios = distance_ratios(block_of(4, 3.0))
    assert ratios.max() > 1.5 * ratios.min()


def test_the_block_has_another_minimiser_than_mse() -> None:
    """For two equally likely truths u and v, MSE is minimal at their mean, MGHF-n at the point
    whose features are the mean of theirs, which the inverse gives. Its pixel risk is higher: "exact
    calibration" holds only for isometries, and a loss that had it could not be better than MSE."""
    block = block_of(4, activation="softplus")
    u, v = 2 * draws.randn(2, 100, 4, dtype=torch.float64)

    def features(w: Tensor) -> Tensor:
        return on_points(block, w)

    def risk(f: Map, w: Tensor) -> Tensor:
        """The mean squared error under ``f`` of each point, over both truths."""
        return ((f(w) - f(u)).square() + (f(w) - f(v)).square()).sum(1) / 2

    mean = (u + v) / 2
    perceptual = on_points(block.inverse, (features(u) + features(v)) / 2)
    assert (risk(features, perceptual) < risk(features, mean)).all()
    pixels = risk(lambda w: w, perceptual) / risk(lambda w: w, mean)
    assert (pixels > 1).all() and pixels.median() > 1.01


def test_a_loss_that_is_not_injective_misses_differences() -> None:
    """Part (i) holds: average pooling maps a checkerboard of any contrast to 0."""
    checkerboard = torch.tensor([[1.0, -1], [-1, 1]]).repeat(4, 4)[None, None]
    image = draws.rand(1, 1, 8, 8)
    torch.testing.assert_close(
        F.avg_pool2d(image, 2), F.avg_pool2d(image + 0.3 * checkerboard, 2), rtol=0, atol=1e-6
    )


# ---- Theorem 1 -----------------------------------------------------------------------------------


def test_moments_of_the_features_are_not_those_of_the_image() -> None:
    """f^-1(f(X)) = X has X's moments, as the proof says; f(X), which the loss compares, has not."""
    block = block_of(4, 3.0)
    x = draws.randn(5000, 4, dtype=torch.float64)
    y = on_points(block, x)
    torch.testing.assert_close(on_points(block.inverse, y), x)
    assert (y.mean(0) - x.mean(0)).abs().max() > 0.1
    assert (y.var(0) / x.var(0) - 1).abs().max() > 0.1


def test_a_determinant_says_nothing_of_the_condition() -> None:
    """|det| = 1 and a condition number of a million: gradients may vanish and explode; without a
    clamp the scale alone can make the inverse useless in float32."""
    block = block_of(4, 0.0)
    block.mix.weight.copy_(
        torch.tensor([1e3, 1e-3, 1, 1], dtype=torch.float64).diag().view(4, 4, 1, 1)
    )
    x = draws.randn(1, 4, 2, 2, dtype=torch.float64)
    assert block.log_det(x).abs() < 1e-9
    jacobian = torch.autograd.functional.jacobian(block, x).view(16, 16)
    assert torch.linalg.cond(jacobian) > 0.9e6

    torch.manual_seed(0)
    free, clamped = (
        DetailFeatureExtractor(3, 8, clamp=c).requires_grad_(False) for c in (None, 1.0)
    )
    clamped.load_state_dict(free.state_dict())
    image = draws.rand(1, 3, 16, 16)
    for extractor in (free, clamped):
        for kernel in extractor.blocks[0].rho.kernels():
            kernel *= 12
        assert torch.isfinite(extractor.blocks[0].log_det(extractor.stem(image))).all()
    assert free.invertibility_error(image) > 0.1
    assert clamped.invertibility_error(image) < 1e-5


def test_relu6_makes_a_homeomorphism_and_softplus_a_diffeomorphism() -> None:
    """With ReLU6 the block's derivative jumps at kinks, so it is no C1 map; with softplus it is."""
    jumps = {}
    for activation in ("relu6", "softplus"):
        block = block_of(4, 3.0, activation=activation)
        path = torch.linspace(-3, 3, 3001, dtype=torch.float64)[:, None]
        x = (path * torch.tensor([0.9, -0.4, 0.7, 0.3]).double())[:, :, None, None].requires_grad_()
        (slope,) = torch.autograd.grad(block(x).sum(), x)
        jumps[activation] = float(slope.flatten(1).diff(dim=0).abs().amax())
    assert jumps["relu6"] > 10 * jumps["softplus"]


# ---- Corollary 1 ---------------------------------------------------------------------------------


def fourier_coefficients(samples: Tensor) -> Tensor:
    """c_n of one period, sum c_n e^{jnt}: the two-sided series that the paper uses, so a cosine of
    amplitude A has c_1 = A / 2."""
    return torch.fft.fft(samples) / samples.shape[-1]


def test_relu_harmonics() -> None:
    """relu(cos t): c_0 = 1/pi, c_1 = 1/4, c_2 = 1/(3 pi), c_3 = 0, c_4 = -1/(15 pi), c_n =
    cos(n pi / 2) / (pi (1 - n^2)). The amplitude of the nth cosine is 2 c_n."""
    t = torch.arange(2**16, dtype=torch.float64) * (2 * math.pi / 2**16)
    c = fourier_coefficients(t.cos().relu())
    assert c.imag[:9].abs().max() < 1e-9
    expected = [1 / math.pi, 1 / 4, 1 / (3 * math.pi), 0, -1 / (15 * math.pi)]
    assert c.real[:5].tolist() == pytest.approx(expected, abs=1e-8)
    for n in range(2, 20):
        assert float(c.real[n]) == pytest.approx(
            math.cos(n * math.pi / 2) / (math.pi * (1 - n * n)), abs=1e-8
        )
    # A sine is the same a quarter of a period later: c_n e^{-jn pi/2}. c_1 = -j/4, c_2 changes its
    # sign, c_0 and c_4 do not change.
    of_sine = fourier_coefficients(t.sin().relu())
    assert complex(of_sine[1]) == pytest.approx(-0.25j, abs=1e-8)
    assert complex(of_sine[2]) == pytest.approx(-1 / (3 * math.pi), abs=1e-8)
    assert complex(of_sine[4]) == pytest.approx(-1 / (15 * math.pi), abs=1e-8)


@pytest.mark.parametrize("activation", ["relu6", "softplus", "leaky_relu"])
def test_the_invertible_block_makes_harmonics_too(activation: str) -> None:
    """Any nonlinear map adds overtones: a cosine has some in the block's output, while a
    convolution, which may lose information, adds none."""
    period, edge = 16, 4  # what is nearer to the border than `edge` sees the padding
    wave = torch.cos(torch.arange(4 * period + 2 * edge).double() * (2 * math.pi / period))
    block = block_of(4, 3.0, activation=activation)
    image = (wave * torch.tensor([1.0, -0.5, 0.8, 0.3]).double().view(1, 4, 1, 1)).expand(
        1, 4, 5, -1
    )

    def overtones(maps: Tensor) -> float:
        """Power at twice the frequency and above, divided by that at the frequency."""
        row = maps[0, :, 2, edge:-edge]
        power = fourier_coefficients(row).abs().square()[:, : 2 * period].sum(0)
        assert power.view(-1, 4)[:, 1:].sum() < 1e-20  # four cycles: every fourth coefficient
        return float(power[8:].sum() / power[4])

    assert overtones(block(image)) > 1e-3
    assert overtones(F.conv2d(image, torch.ones(2, 4, 1, 1).double())) < 1e-20


# ---- Theorem 2 -----------------------------------------------------------------------------------


def unit(*shape: int) -> Tensor:
    return F.normalize(draws.randn(*shape, dtype=torch.float64), dim=-1)


def test_lip_is_no_lower_bound_of_information_at_the_papers_q() -> None:
    """With Q = 1 / (N - 1), as in the proof, all negatives together have the weight of a positive:
    independent embeddings, I(G; S) = 0, still "share" most of ln N."""
    n = 64
    query, key = unit(8, n, 32), unit(8, n, 32)
    small_q = functional.monce_loss(query, key, temperature=0.5, negative_weight=1 / (n - 1))
    nce = functional.patch_nce_loss(query, key, temperature=0.5)
    assert math.log(n) - float(small_q) > 3  # "I >= ..."
    assert math.log(n) - float(nce) < 0.1  # InfoNCE's does hold


def test_lip_with_hard_negatives_is_looser_than_infonce() -> None:
    """With Q = 1, as in the definition of the loss, all negatives together have weight N - 1 as in
    InfoNCE. A plan that prefers hard negatives increases the loss and decreases the "bound", one
    that prefers easy ones does the opposite; a uniform plan changes nothing."""
    query = unit(4, 32, 16)
    key = F.normalize(query + 0.5 * draws.randn_like(query), dim=-1)
    nce = float(functional.patch_nce_loss(query, key))
    options = {"epsilon": 0.3}
    assert float(functional.monce_loss(query, key, cost="hard", **options)) > nce
    assert float(functional.monce_loss(query, key, cost="easy", **options)) < nce
    flat = float(functional.monce_loss(query, key, epsilon=1e6))
    assert flat == pytest.approx(nce, rel=1e-4)


def test_the_mean_inequality_bounds_the_other_side() -> None:
    """The AM-GM inequality of eq. 52 makes the logarithm of a sum larger than a mean of logarithms,
    so ln N - L is *at most* what eq. 55 bounds it by from below."""
    log_r = 3 * draws.randn(1000, 16, dtype=torch.float64)  # of the positive, then the negatives
    left = math.log(16) + log_r[:, 0] - log_r.logsumexp(1)
    right = log_r[:, 0] - log_r.mean(1)
    assert (left <= right + 1e-12).all() and (left < right - 0.1).all()


# ---- the page ------------------------------------------------------------------------------------


def test_the_page_names_every_test_and_no_other() -> None:
    page = (Path(__file__).parents[1] / "docs" / "theory.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", page))
    here = {name for name in globals() if name.startswith("test_")}
    elsewhere = (Path(__file__).parent / "test_analysis.py").read_text()
    assert {n for n in named - here if f"def {n}(" not in elsewhere} == set()
    assert here - named == {test_the_page_names_every_test_and_no_other.__name__}
