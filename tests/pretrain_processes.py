"""Trainings in separate processes, which are killed, run out of disk, or are joined as ranks:
`python pretrain_processes.py DIRECTORY` prints the results as JSON.

The processes are forked, so that torch is imported once; before that nothing is computed, because
torch's threads do not survive a fork."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

os.environ["OMP_NUM_THREADS"] = "1"

import torch._dynamo  # noqa: F401  a first step would import it, in every process

from mghf_fast.commands import cli
from mghf_fast.commands.pretrain import batches, card, checkpoint, train

SMALL = "--size 16 --batch 4 --channels 4 --stages 4 --held-out 8 --workers 0 --threads 1"
OFTEN = "--log-every 4 --evaluate-every 10 --checkpoint-every 3"
TINY = ["pretrain", *SMALL.split(), *OFTEN.split(), "--steps"]


def forked(action: Callable[[], int]) -> int:
    """Starts ``action`` in a new process, whose exit code is the action's result."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    code = 70
    try:
        code = action()
    finally:
        sys.stderr.flush()
        os._exit(code)


def ended(pid: int) -> int:
    """The exit code; negative: the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def has_ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def training(out: Path, steps: int, *more: str) -> int:
    return cli.main([*TINY, str(steps), "--out", str(out), "--resume", *more])


def digests(out: Path) -> dict[str, str]:
    """Digests of the weights, and of the curve of losses, accuracies and learning rates."""
    curve = json.dumps(json.loads((out / card.CARD).read_text())["curve"])
    return {
        "weights": hashlib.sha256((out / card.WEIGHTS).read_bytes()).hexdigest(),
        "curve": hashlib.sha256(curve.encode()).hexdigest(),
    }


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dies_at(owner: object, name: str, call: int, *, after: bool) -> None:
    """Makes the function ``owner.name`` kill the process at its ``call``-th call."""
    function, calls = getattr(owner, name), 0

    def deadly(*arguments: object, **options: object) -> object:
        nonlocal calls
        calls += 1
        if calls == call and not after:
            die()
        result = function(*arguments, **options)
        if calls == call:
            die()
        return result

    setattr(owner, name, deadly)


def last_written(out: Path) -> int:
    """Identifies the checkpoint's file; 0 if there is none yet."""
    try:
        return (out / checkpoint.NAME).stat().st_ino
    except FileNotFoundError:
        return 0


def kills(directory: Path) -> dict[str, object]:
    """One undisturbed training, one that is killed at chosen places, and one at random moments."""
    steps = 30
    whole, chosen, anywhere = (directory / name for name in ("whole", "chosen", "anywhere"))
    assert ended(forked(lambda: training(whole, steps))) == 0

    places = [
        (train.Run, "train_on", 2, False),  # before the first checkpoint
        (os, "fsync", 1, False),  # the first checkpoint written, not yet on the disk
        (os, "replace", 1, False),  # complete, not yet in place
        (os, "replace", 2, True),  # in place
        (train.Run, "train_on", 5, True),
        (train.Run, "evaluate", 1, False),
        (os, "replace", 1, False),
    ]
    codes, left = [], []
    for place in places:

        def killed(place: tuple[object, str, int, bool] = place) -> int:
            dies_at(*place[:3], after=place[3])
            return training(chosen, steps)

        codes.append(ended(forked(killed)))
        left.append((chosen / checkpoint.NAME).exists())
    leftovers = len(list(chosen.glob(".*.tmp")))
    codes.append(ended(forked(lambda: training(chosen, steps))))

    # At a random moment after a checkpoint has appeared or been replaced.
    at_random, random = [], Random(0)
    while not at_random or at_random[-1] != 0:
        before = last_written(anywhere)
        pid = forked(lambda: training(anywhere, steps))
        if len(at_random) < 6:
            while last_written(anywhere) == before and not has_ended(pid):
                time.sleep(0.001)
            time.sleep(random.uniform(0, 0.05))
            os.kill(pid, signal.SIGKILL)
        at_random.append(ended(pid))
    return {
        "codes": codes,
        "checkpoints": left,
        "leftovers": leftovers,
        "leftovers at the end": len(list(chosen.glob(".*.tmp"))),
        "at random": at_random,
        "whole": digests(whole),
        "chosen": digests(chosen),
        "anywhere": digests(anywhere),
    }


def full_disk(directory: Path) -> dict[str, object]:
    """A training that cannot write files as large as a checkpoint, after one that could."""
    out, told = directory / "out", directory / "told"
    assert ended(forked(lambda: training(out, 6))) == 0
    before = (out / checkpoint.NAME).read_bytes()

    def starved() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, len(before) // 2))
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors):
            code = training(out, 12)
        told.write_text(errors.getvalue())
        return code

    return {
        "code": ended(forked(starved)),
        "told": told.read_text().splitlines()[-1],
        "unchanged": (out / checkpoint.NAME).read_bytes() == before,
        "files": sorted(path.name for path in out.iterdir()),
        "resumed": ended(forked(lambda: training(out, 12))),
    }


def _join(directory: Path, name: str, action: Callable[[int], int]) -> dict[str, object]:
    """Runs two ranks; returns their exit codes and the last lines that they print."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def rank(number: int) -> int:
        os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors):
            code = action(number)
        (directory / f"{name}-{number}").write_text(errors.getvalue())
        return code

    pids = [forked(lambda number=number: rank(number)) for number in range(2)]  # type: ignore[misc]
    codes = [ended(pid) for pid in pids]
    lines = [(directory / f"{name}-{number}").read_text().splitlines() for number in range(2)]
    return {"codes": codes, "told": [told[-1] if told else "" for told in lines]}


def ranks(directory: Path) -> dict[str, object]:
    """Two ranks that agree, stop and resume; and pairs that do not agree."""
    whole, parts, seeds = (directory / name for name in ("whole", "parts", "seeds"))

    def noting(number: int) -> int:
        """Records every rank's images, and its weights at the end."""
        save, step = train._save, train.Run.train_on
        images = hashlib.sha256()

        def looked_at(run: train.Run, batch: batches.Batch) -> None:
            images.update(batch.images.numpy().tobytes())
            step(run, batch)

        def noting_save(run: train.Run, *rest: object) -> None:
            state = run.network.extractor.to_safetensors()
            noted = {"weights": hashlib.sha256(state).hexdigest(), "images": images.hexdigest()}
            (directory / f"noted-{number}").write_text(json.dumps(noted))
            save(run, *rest)  # type: ignore[arg-type]

        train._save, train.Run.train_on = noting_save, looked_at  # type: ignore[method-assign]
        return training(whole, 12)

    result: dict[str, object] = {"together": _join(directory, "together", noting)}
    result["noted"] = [json.loads((directory / f"noted-{n}").read_text()) for n in range(2)]
    result["half"] = _join(directory, "half", lambda number: training(parts, 7))["codes"]
    result["rest"] = _join(directory, "rest", lambda number: training(parts, 12))["codes"]
    result["whole digests"], result["parts digests"] = digests(whole), digests(parts)
    result["seeds"] = _join(
        directory, "seeds", lambda number: training(seeds, 12, "--seed", str(number))
    )
    result["no data"] = _join(
        directory,
        "none",
        lambda number: training(seeds, 12, *(["--data", "none"] if number else [])),
    )
    result["odd"] = _join(directory, "odd", lambda number: training(seeds, 12, "--batch", "5"))
    result["alone"] = ended(forked(lambda: training(whole, 12)))
    return result


def distances(directory: Path) -> dict[str, object]:
    """Two ranks that learn a teacher's distances, with and without a stop; {} without a teacher."""
    if importlib.util.find_spec("stlpips_pytorch") is None:
        return {}
    whole, parts = (directory / name for name in ("whole", "parts"))
    words = "--objective distances --batch 2 --held-out 2 --workers 0 --threads 1 --steps 4"
    often = "--log-every 2 --evaluate-every 4 --checkpoint-every 2 --resume"

    def learning(out: Path, last: int) -> int:
        step = train.Run.train_on

        def stopping(run: train.Run, batch: object) -> None:
            if run.step == last:
                raise KeyboardInterrupt
            step(run, batch)

        train.Run.train_on = stopping  # type: ignore[method-assign]
        return cli.main(["pretrain", *words.split(), *often.split(), "--out", str(out)])

    return {
        "whole": _join(directory, "whole-told", lambda number: learning(whole, 4))["codes"],
        "half": _join(directory, "half-told", lambda number: learning(parts, 3))["codes"],
        "rest": _join(directory, "rest-told", lambda number: learning(parts, 4))["codes"],
        "whole digests": digests(whole),
        "parts digests": digests(parts),
    }


if __name__ == "__main__":
    found = {}
    for scenario in (kills, full_disk, ranks, distances):
        place = Path(sys.argv[1], scenario.__name__)
        place.mkdir()
        found[scenario.__name__] = scenario(place)
    print(json.dumps(found))
