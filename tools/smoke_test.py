"""Tries an installed mghf_fast from outside its source tree: `python smoke_test.py [kernels]`. With
the argument `kernels` it must have native kernels."""

import subprocess
import sys
from pathlib import Path

import torch

import mghf_fast
import mghf_fast.kernels
from mghf_fast import native


def check_kernels() -> str:
    """Checks that the wheel's kernels are those that this torch can load; describes them."""
    facts = native.build_facts()
    if not facts:
        assert "kernels" not in sys.argv, "the wheel has no kernels"
        return "no kernels"
    assert "cpu" in mghf_fast.available_backends(), native.unavailable_reason()
    assert torch.ops.mghf_native.cpu_capability() in facts["capabilities"]
    if facts["cuda"] is None:
        return "kernels of the CPU"
    reason, ours, theirs = native.cuda_unavailable_reason(), facts["cuda"], torch.version.cuda
    if theirs is None:
        assert reason is not None and "built without CUDA" in reason
        return f"kernels of the CPU; those of CUDA are left out: {reason}"
    if ours["version"].split(".")[0] != theirs.split(".")[0]:
        assert reason is not None and "install the wheel for CUDA" in reason
        return f"kernels of the CPU; those of CUDA are left out: {reason}"
    assert reason is None, reason
    registered = torch._C._dispatch_has_kernel_for_dispatch_key
    missing = [op for op in facts["cuda"]["ops"] if not registered(f"mghf_native::{op}", "CUDA")]
    assert not missing, missing
    return f"kernels of the CPU and of CUDA for {', '.join(facts['cuda']['ops'])}"


def main() -> None:
    package = Path(mghf_fast.__file__).resolve().parent
    assert not (package.parent / "setup.py").exists(), f"{package} is the source tree"
    assert (package / "py.typed").exists()
    kernels = check_kernels()

    torch.manual_seed(0)
    sr = torch.rand(1, 3, 64, 64, requires_grad=True)
    gt = torch.rand(1, 3, 64, 64)
    loss = mghf_fast.MGHFLoss()(sr, gt)
    loss.backward()
    assert loss.isfinite() and sr.grad is not None
    assert sr.grad.isfinite().all() and sr.grad.norm() > 0

    plan = mghf_fast.functional.sinkhorn_plan(torch.rand(2, 9, 9))
    torch.testing.assert_close(plan.sum(1), torch.ones(2, 9))

    doctor = Path(sys.executable).parent / "mghf-fast"
    subprocess.run([doctor, "doctor"], check=True)
    print(f"mghf_fast {mghf_fast.__version__} in {package}: ok, {kernels}")


if __name__ == "__main__":
    main()
