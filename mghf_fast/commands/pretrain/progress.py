"""Shows the progress of a pretraining: lines or a bar, and TensorBoard's curves."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

from .run import Run


class Progress:
    """A bar on a terminal (if tqdm is installed), else lines; on the first rank."""

    def __init__(self, run: Run, steps: int) -> None:
        self._steps, self._shown = steps, run.ranks.first
        self._bar: Any = None
        if self._shown and sys.stderr.isatty() and importlib.util.find_spec("tqdm"):
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=run.step, desc="pretrain", dynamic_ncols=True)

    def advance(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def tell(self, entry: dict[str, float]) -> None:
        """An entry of the curve."""
        told = "  ".join(f"{k.replace('_', ' ')} {v:.4g}" for k, v in entry.items() if k != "step")
        self.say(f"step {entry['step']}/{self._steps}  {told}")

    def say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        elif self._shown:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class Board:
    """TensorBoard's event files, if requested."""

    def __init__(self, run: Run) -> None:
        self._writer: Any = None
        if run.settings.tensorboard and run.ranks.first:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(
                str(run.settings.out / "tensorboard"), purge_step=run.step or None
            )

    def add(self, entry: dict[str, float]) -> None:
        """An entry of the curve."""
        if self._writer is not None:
            for name, value in entry.items():
                if name != "step":
                    self._writer.add_scalar(name, value, int(entry["step"]))
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
