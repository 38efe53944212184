"""The rule by which Sinkhorn's iterations stop, on embeddings of photographs and in the kernels."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from benchmarks import iterations
from mghf_fast import MGHFLoss
from mghf_fast.backends import triton_is_interpreted

pytest.importorskip("skimage")

ROOT = Path(__file__).parent.parent
MOST = 6
FOUR_PATCHES = 64  # pixels; for four patches the plan itself may need more


@pytest.fixture(scope="module", params=iterations.EXTRACTORS)
def loss(request: pytest.FixtureRequest) -> MGHFLoss:
    return MGHFLoss(extractor=request.param)


@pytest.fixture(scope="module")
def picture() -> Tensor:
    return iterations.pictures(None)[0]


Found = tuple[str, float, list[int], list[int], float]


def found(loss: MGHFLoss, picture: Tensor, size: int, maps: int) -> Iterator[Found]:
    query, key = iterations.embeddings(loss, picture, size, maps)
    return iterations.lines(query, key, 1.0)


@pytest.mark.parametrize(("size", "maps"), [(64, 24), (128, 24), (256, 12), (512, 2)])
def test_noise_keeps_no_map_running(loss: MGHFLoss, picture: Tensor, size: int, maps: int) -> None:
    made = []
    for name, noise, counts, _, rest in found(loss, picture, size, maps):
        assert rest <= 4e-6, (name, noise)
        if size > FOUR_PATCHES:
            assert max(counts) <= MOST, (name, noise, counts)
        made.append(counts)
    # Rounding changes the count of few maps, and only by one.
    assert np.ptp(made, axis=0).max() <= 1


def test_the_rule_of_before_kept_maps_running(loss: MGHFLoss, picture: Tensor) -> None:
    """The former rule would fail the test above: some map runs all iterations."""
    for name, noise, _, before, _ in found(loss, picture, 256, 12):
        if noise == max(iterations.NOISES) and name == "scaling":
            assert max(before) == iterations.ITERATIONS


@pytest.mark.parametrize("rate", [0.9, 0.5, 0.1, 1e-3])
def test_what_is_left(rate: float) -> None:
    """If changes decrease steadily, at most the promised error remains, and the iterations do not
    continue for much longer than necessary, whatever rounding adds."""
    changes = 0.3 * rate ** np.arange(200)
    rounded = changes + 2e-6 * (1 + np.random.default_rng(0).random(200)) / 2
    for spreads, most in ((changes, 1.001), (rounded, 2)):  # a fifth of CLEAN is rounding here
        made = iterations.settled(spreads.tolist())
        assert changes[made:].sum() <= most * iterations.REST
        assert made <= 3 or changes[made - 2 :].sum() > 0.2 * iterations.REST


def test_bounds_of_the_rule() -> None:
    assert iterations.settled([0.0] * 9) == 2  # a plan from the start
    assert iterations.settled([np.nan] * 9) == 9
    assert iterations.settled([0.5, 3e-5, 1e-6]) == 3  # one fall is trusted up to a factor of 20
    assert iterations.settled([0.5, 1.5e-5, 1e-6]) == 2
    assert iterations.settled([2e-6] * 9) == 2  # below rounding


def test_twins() -> None:
    """The kernels use the constants of the rule that is tested here."""
    wanted = (iterations.CLEAN, iterations.FASTEST, iterations.REST)
    text = (ROOT / "csrc/common/sinkhorn_settling.h").read_text()
    names = ("kClean", "kFastest", "kRest")
    given = [re.search(rf"{name} = ([\de.-]+)f;", text) for name in names]
    assert tuple(float(x[1]) for x in given if x) == wanted
    text = (ROOT / "kernels/sinkhorn_potentials.py").read_text()
    given = [
        re.search(rf"^{name} = tl.constexpr\(([\de.-]+)\)", text, re.M)
        for name in ("CLEAN", "FASTEST", "REST")
    ]
    assert tuple(float(x[1]) for x in given if x) == wanted


@pytest.mark.skipif(not triton_is_interpreted(), reason="the interpreter's powers are to be noisy")
@pytest.mark.parametrize("noise", iterations.NOISES)
def test_triton_kernel_under_noise(
    loss: MGHFLoss, picture: Tensor, noise: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel itself, with noise in its powers of two."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    from mghf_fast.kernels import sinkhorn_potentials

    power = InterpreterBuilder.create_exp2

    def noisy(self: InterpreterBuilder, x: TensorHandle) -> TensorHandle:
        result = power(self, x)
        result.data = result.data * iterations.errors(np.ascontiguousarray(x.data), noise)
        return result

    monkeypatch.setattr(InterpreterBuilder, "create_exp2", noisy)
    query, key = iterations.embeddings(loss, picture, 256, 3)
    _, steps = sinkhorn_potentials.solve(query @ key.mT, "hard", 1.0, 50, None, False, settle=True)
    assert steps[:, 0].max() <= MOST and (steps[:, 1] == iterations.ITERATIONS).all()


def test_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert iterations.main(["--sizes", "64", "--maps", "2", "--epsilon", "1"]) == 0
    out = capsys.readouterr().out
    assert "perceptual-v1, N = 4, 2 maps, epsilon 1" in out and "before" in out
    for arguments, message in (
        (["--sizes", "16"], "16 is below a patch's 32 pixels"),
        (["--epsilon", "0"], "argument --epsilon: 0.0 is not above 0"),
        (["--maps", "0"], "argument --maps: 0 is not at least 1"),
        (["--pictures", str(tmp_path / "none")], "there is no such directory"),
    ):
        with pytest.raises(SystemExit):
            iterations.main(arguments)
        assert message in capsys.readouterr().err
