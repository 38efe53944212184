"""MGHF added to L1 with Hugging Face's accelerate.

    accelerate launch --num_processes 2 examples/with_accelerate.py --steps 20

The loss is moved to the device but not prepared, because ``save_state`` would save a prepared loss
as another model. Under ``--mixed_precision`` it still computes in float32.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from fine_tune import WEIGHT, batches, network

from mghf_fast import MGHFLoss


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), default="no")
    arguments = parser.parse_args()

    # Without `cpu`, on a machine without a GPU each process would train its own network.
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(), mixed_precision=arguments.mixed_precision
    )
    torch.manual_seed(0)
    net = network()
    perceptual = MGHFLoss(input_range="0,1").to(accelerator.device)
    net, optimizer = accelerator.prepare(net, torch.optim.Adam(net.parameters(), 1e-3))
    for step, (low, gt) in enumerate(batches(arguments.steps, accelerator.process_index)):
        low, gt = low.to(accelerator.device), gt.to(accelerator.device)
        with accelerator.autocast():
            sr = net(low)
            pixel, mghf = F.l1_loss(sr, gt), perceptual(sr, gt)
        optimizer.zero_grad()
        accelerator.backward(pixel + WEIGHT * mghf)
        optimizer.step()
        accelerator.print(f"step {step}: l1 {pixel.item():.4f}, mghf {mghf.item():.4f}")

    total = sum(p.detach().double().sum() for p in net.parameters())
    print(f"rank {accelerator.process_index}: parameters add up to {total:.10f}", flush=True)
    accelerator.end_training()


if __name__ == "__main__":
    main()
