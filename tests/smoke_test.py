"""Tries an installed mghf_fast from outside its source tree: `python smoke_test.py`."""

import subprocess
import sys
from pathlib import Path

import torch

import mghf_fast
import mghf_fast.kernels
from mghf_fast import native


def main() -> None:
    package = Path(mghf_fast.__file__).resolve().parent
    assert not (package.parent / "setup.py").exists(), f"{package} is the source tree"
    assert (package / "py.typed").exists()
    assert "cpu" in mghf_fast.available_backends(), "the wheel has no kernels"
    assert torch.ops.mghf_native.cpu_capability() in native.build_facts()["capabilities"]

    torch.manual_seed(0)
    sr = torch.rand(1, 3, 64, 64, requires_grad=True)
    gt = torch.rand(1, 3, 64, 64)
    loss = mghf_fast.MGHFLoss()(sr, gt)
    loss.backward()
    assert loss.isfinite() and sr.grad is not None
    assert sr.grad.isfinite().all() and sr.grad.norm() > 0

    plan = mghf_fast.functional.sinkhorn_plan(torch.rand(2, 9, 9), backend="cpu")
    torch.testing.assert_close(plan.sum(1), torch.ones(2, 9))

    doctor = Path(sys.executable).parent / "mghf-fast"
    subprocess.run([doctor, "doctor"], check=True)
    print(f"mghf_fast {mghf_fast.__version__} in {package}: ok")


if __name__ == "__main__":
    main()
