"""MGHF added to L1 under DistributedDataParallel.

    torchrun --nproc_per_node 2 examples/ddp.py --steps 20

The loss is not wrapped, because it has nothing to train or synchronise. Each process compares its
own images, and DDP averages the network's gradients. (:class:`mghf_fast.DECLoss` compares all
patches of a batch with each other; with ``gather=True`` it compares those of all processes.)
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from fine_tune import WEIGHT, batches, network
from torch.nn.parallel import DistributedDataParallel

from mghf_fast import MGHFLoss


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args().steps

    gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if gpu else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")

    torch.manual_seed(0)
    net = DistributedDataParallel(network().to(device))
    perceptual = MGHFLoss(input_range="0,1").to(device)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for step, (low, gt) in enumerate(batches(steps, seed=dist.get_rank())):
        sr, gt = net(low.to(device)), gt.to(device)
        pixel, mghf = F.l1_loss(sr, gt), perceptual(sr, gt)
        optimizer.zero_grad()
        (pixel + WEIGHT * mghf).backward()
        optimizer.step()
        if dist.get_rank() == 0:
            print(f"step {step}: l1 {pixel.item():.4f}, mghf {mghf.item():.4f}", flush=True)

    total = sum(p.detach().double().sum() for p in net.parameters())
    print(f"rank {dist.get_rank()}: parameters add up to {total:.10f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
