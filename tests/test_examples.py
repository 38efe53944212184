"""The examples, each on two processes with gloo: they run, and both processes train one network."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import trainers

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def launch(script: str, *options: str) -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    wrapped = [str(Path(__file__).with_name("without_teardown.py")), str(EXAMPLES / script)]
    done = trainers.run([*torchrun, *wrapped, *options], EXAMPLES)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def check(output: str, steps: int) -> None:
    """Every step prints two finite losses above 0 once; at the end both networks are equal."""
    # Only numbers are parsed, because the processes' lines may be interleaved.
    told = re.findall(r"step (\d+): l1 ([\d.]+), mghf ([\d.]+)", output)
    assert [int(step) for step, _, _ in told] == list(range(steps)), output
    assert all(0 < float(loss) < 10 for _, *losses in told for loss in losses), output
    sums = re.findall(r"rank ([01]): parameters add up to (-?[\d.]+)", output)
    assert sorted(rank for rank, _ in sums) == ["0", "1"], output
    assert sums[0][1] == sums[1][1], output


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed")
def test_ddp() -> None:
    check(launch("ddp.py", "--steps", "3"), 3)


def test_accelerate() -> None:
    trainers.need("accelerate")
    check(launch("with_accelerate.py", "--steps", "3", "--mixed_precision", "bf16"), 3)


def test_lightning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that contains the loss can be trained, and its checkpoint can be loaded."""
    trainers.need("lightning", "torchmetrics", "lightning_utilities")
    trainers.supply_torchvision()
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import lightning
    from fine_tune import WEIGHT, batches, network

    from mghf_fast import MGHFLoss

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.loss = network(), MGHFLoss(input_range="0,1")

        def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], _: int) -> torch.Tensor:
            low, gt = batch
            sr = self.net(low)
            return F.l1_loss(sr, gt) + WEIGHT * self.loss(sr, gt)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.net.parameters(), 1e-3)

    module = Module()
    before = {name: value.clone() for name, value in module.net.state_dict().items()}
    trainer = lightning.Trainer(
        max_steps=2,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, torch.utils.data.DataLoader(list(batches(2, seed=0)), batch_size=None))
    assert all(not torch.equal(v, before[k]) for k, v in module.net.state_dict().items())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    state = torch.load(tmp_path / "x.ckpt", weights_only=False)["state_dict"]
    again = Module()
    again.load_state_dict(state)
    assert all(torch.equal(v, module.state_dict()[k]) for k, v in again.state_dict().items())
