"""The demo's small super-resolution network, trained on L1: the weights that ship as its start.

    python -m benchmarks.studies.start_network --images photographs/ --out build/start
    python -m benchmarks.studies.start_network --out build/start --ship --data "400 photographs ..."

The first command trains: random crops under the demo's degradation, Adam with a rate from 1e-3 down
a cosine to 1e-5. Every 500 steps it writes a checkpoint, from which the same command continues. The
crops depend on the seed and the step alone, so an interruption does not change the result (on the
same machine with the same number of threads). --steps may change in between, which moves the
cosine's end; the card then lists the step from which each value was used. The results are
start.safetensors and start.json.

The second command puts a run's weights into the package, as demo-start.safetensors with its card,
and the digest into mghf_fast/weights/__init__.py. It also accepts a checkpoint, and the card then
says how far the run was.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import re
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save

import mghf_fast
from mghf_fast import weights
from mghf_fast.commands.demo.network import START_NAME, CompactEDSR
from mghf_fast.commands.demo.photographs import Photograph, load
from mghf_fast.commands.demo.settings import random_source
from mghf_fast.commands.demo.train import batches
from mghf_fast.commands.files import write_whole
from mghf_fast.commands.rasters import SUFFIXES

LEARNING_RATE, LAST_RATE = 1e-3, 1e-5
CHECKPOINT_EVERY = 500
CHECKPOINT, WEIGHTS, CARD = "checkpoint.pt", "start.safetensors", "start.json"
LARGEST = 2**20
"""Most bytes of the shipped weights."""
DIGESTS = Path(weights.__file__)
"""The source file with the digest."""


def photographs(folder: Path) -> list[Photograph]:
    """Every readable picture below ``folder``, in the order of their paths."""
    found = []
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES):
        try:
            found.append(Photograph(path.relative_to(folder).as_posix(), load(path)))
        except ValueError as error:
            print(f"{path} is left out: {error}")
    if not found:
        raise SystemExit(f"--images {folder} holds no usable picture")
    return found


def digest(pictures: list[Photograph]) -> str:
    """One digest of all pictures' names and pixels."""
    whole = hashlib.sha256()
    for picture in pictures:
        whole.update(picture.name.encode() + picture.pixels.tobytes())
    return whole.hexdigest()


def learning_rate(step: int, steps: int) -> float:
    """Half a cosine from ``LEARNING_RATE`` at step 0 to ``LAST_RATE`` at ``steps``."""
    half_cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return LAST_RATE + (LEARNING_RATE - LAST_RATE) * half_cosine


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The state that :func:`train` wrote to the file; reading it runs no code.

    Raises:
        SystemExit: it is not a whole checkpoint.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file may raise nearly anything
        raise SystemExit(f"{path} is not a whole checkpoint: {error}") from error
    return state


def train(chosen: argparse.Namespace) -> None:
    """Trains to the end, from the checkpoint in ``chosen.out`` if there is one."""
    torch.set_num_threads(chosen.threads)
    chosen.out.mkdir(parents=True, exist_ok=True)
    pictures = photographs(chosen.images)
    described: dict[str, Any] = {
        "pictures": len(pictures),
        "pictures_sha256": digest(pictures),
        "batch": chosen.batch,
        "patch": chosen.patch,
        "seed": chosen.seed,
    }
    network = CompactEDSR(torch.Generator().manual_seed(chosen.seed))
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # is allowed
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99))
    step, seconds = 0, 0.0
    curve: list[dict[str, float]] = []
    schedule: list[dict[str, int]] = []
    path = chosen.out / CHECKPOINT
    if path.exists():
        state = read_checkpoint(path)
        schedule = state["schedule"]
        if state["described"] != described:
            raise SystemExit(f"{path} is of another run: {state['described']}, here {described}")
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        step, seconds, curve = state["step"], state["seconds"], state["curve"]
        print(f"step {step}/{chosen.steps}  going on from {path}", flush=True)
    if not schedule or schedule[-1]["steps"] != chosen.steps:
        schedule.append({"from_step": step, "steps": chosen.steps})

    while step < chosen.steps:
        began = time.perf_counter()
        source = random_source(chosen.seed, "start", step)
        data = batches(pictures, chosen.batch, chosen.patch, source)
        total, count = 0.0, min(CHECKPOINT_EVERY, chosen.steps - step)
        for _ in range(count):
            low, gt = next(data)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, chosen.steps)
            optimizer.zero_grad(set_to_none=True)
            loss = F.l1_loss(network(low.contiguous(memory_format=torch.channels_last)), gt)
            torch.autograd.backward(loss)
            optimizer.step()
            total += float(loss.detach())
            step += 1
        seconds += time.perf_counter() - began
        curve.append({"step": step, "l1": round(total / count, 5)})
        print(f"step {step}/{chosen.steps}  l1 {curve[-1]['l1']:.5f}  {seconds:.0f} s", flush=True)
        buffer = io.BytesIO()
        state = {
            "described": described,
            "network": network.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": step,
            "schedule": schedule,
            "seconds": seconds,
            "curve": curve,
        }
        torch.save(state, buffer)
        write_whole(path, buffer.getvalue())

    content = encode(network.state_dict())
    write_whole(chosen.out / WEIGHTS, content)
    card = {
        "file": WEIGHTS,
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
        "hours": round(seconds / 3600, 3),
        "threads": chosen.threads,
        **described,
        "schedule": schedule,
        "curve": curve,
    }
    write_whole(chosen.out / CARD, (json.dumps(card, indent=1) + "\n").encode())


def encode(state: dict[str, torch.Tensor]) -> bytes:
    """Weights as safetensors."""
    return save({name: tensor.contiguous() for name, tensor in state.items()})


def ship(out: Path, data: str) -> None:
    """Puts the weights of the run in ``out`` into the package, with their card and digest.

    Args:
        data: a description of the pictures for the card.

    Raises:
        SystemExit: there is no run, its weights do not fit the network or are too large, or the
            source file has no digest to replace.
    """
    path = out / CHECKPOINT
    if not path.is_file():
        raise SystemExit(f"{path} is not there: train first")
    state = read_checkpoint(path)
    network = CompactEDSR(torch.Generator())
    network.load_state_dict(state["network"])
    content = encode(network.state_dict())
    if len(content) > LARGEST:
        raise SystemExit(f"the weights are {len(content)} bytes; at most {LARGEST} ship")
    sha256 = hashlib.sha256(content).hexdigest()
    source = DIGESTS.read_text()
    pattern = rf'("{re.escape(START_NAME)}": )"[0-9a-f]{{64}}"'
    source, replaced = re.subn(pattern, rf'\g<1>"{sha256}"', source)
    if replaced != 1:
        raise SystemExit(f"{DIGESTS} has no digest of {START_NAME!r} to replace")
    described, steps = state["described"], state["schedule"][-1]["steps"]
    every = max(1, len(state["curve"]) // 24)
    card = {
        "name": START_NAME,
        "note": "A super-resolution network (x4) that the demo fine-tunes; trained on L1 alone. "
        "None of the photographs that the demo holds out was among its training pictures.",
        "file": f"{START_NAME}.safetensors",
        "sha256": sha256,
        "bytes": len(content),
        "network": "mghf_fast.commands.demo.network.CompactEDSR",
        "parameters": sum(p.numel() for p in network.parameters()),
        "input": "RGB, 0 to 1",
        "data": data,
        "degradation": "mghf_fast.commands.demo.degradation: blur, x4, noise, JPEG",
        "objective": "L1",
        "optimizer": f"Adam, {LEARNING_RATE:g} down a cosine to {LAST_RATE:g}",
        **described,
        "schedule": state["schedule"],
        "steps_done": state["step"],
        "hours": round(state["seconds"] / 3600, 3),
        "curve": state["curve"][every - 1 :: every],
        "date": datetime.now(timezone.utc).date().isoformat(),
        "command": "python -m benchmarks.studies.start_network --images DIR --out DIR "
        + " ".join(f"--{name} {described[name]}" for name in ("batch", "patch", "seed"))
        + f" --steps {steps}",
        "versions": {"mghf_fast": mghf_fast.__version__, "torch": torch.__version__},
    }
    folder = DIGESTS.parent
    write_whole(folder / f"{START_NAME}.safetensors", content)
    write_whole(folder / f"{START_NAME}.json", (json.dumps(card, indent=1) + "\n").encode())
    write_whole(DIGESTS, source.encode())
    print(f"{START_NAME}: step {state['step']}/{steps}, {len(content)} bytes, {sha256}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, metavar="DIR", help="pictures to train on")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--steps", type=int, default=24_000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--patch", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ship", action="store_true", help="put the run's weights in the package")
    parser.add_argument("--data", metavar="TEXT", help="with --ship: what the pictures were")
    chosen = parser.parse_args(arguments)
    for name in ("steps", "batch", "threads"):
        if (value := getattr(chosen, name)) < 1:
            parser.error(f"--{name} is {value}; allowed are whole numbers from 1 up")
    if chosen.ship:
        if not chosen.data:
            parser.error("--ship needs --data TEXT, which tells the card what the pictures were")
        ship(chosen.out, chosen.data)
    elif chosen.images is None:
        parser.error("--images DIR is needed, the pictures to train on")
    else:
        train(chosen)


if __name__ == "__main__":
    main()
