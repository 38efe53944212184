"""``mghf-fast demo --ablation``: the rows of the paper's Tables 4 and 6, trained like the demo's.

Every row is one fine-tuning from the demo's start, with its batches, schedule and number of steps,
on L1 + w * objective. The weight w makes the objective's gradient on the super-resolved picture,
averaged over the first batches, as long as that of the demo's own weighted MGHF-c: rows differ in
the direction of their gradients, not in the length.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mghf_fast.losses import PRESETS, Preset

from ..evaluate.stlpips import unavailable_reason
from . import losses, objectives, pipeline, summary
from .metrics import Quality
from .objectives import Objective
from .output import GENERATOR
from .settings import DemoError, DemoSettings
from .train import super_resolve, train

NOT_COMPARABLE = (
    "The paper's figures are of other networks (OSEDiff, SinSR), data and metrics; their size "
    "cannot be compared with these, at most the order of the rows."
)
LPIPS_NOTE = (
    "The judge is shift-tolerant LPIPS on AlexNet; the LPIPS that is trained on is the same "
    "distance on VGG-16, so that row is judged by a relative."
)
BASE, NAIVE, FULL = "L1 (base)", "MGHF-n", "MGHF-c"
VGG, LPIPS = "VGG-16 loss", "LPIPS loss"


@dataclass(frozen=True)
class Row:
    """An objective added to L1, with the published figures.

    ``table6`` is (PSNR, SSIM, LPIPS) for OSEDiff on DRealSR, ``table4`` NIQE for SinSR on
    DIV2K-Val, RealSet65 and RealSR.
    """

    name: str
    build: Callable[[], Objective] | None
    """None for L1 alone."""
    table6: tuple[float, float, float] | None = None
    table4: tuple[float, float, float] | None = None
    needs_vgg: bool = False


def _only(
    gammas: tuple[int, int, int], betas: tuple[int, int, int] = (1, 1, 1)
) -> Callable[[], Objective]:
    """MGHF-c with the demo's preset, each weight multiplied by its factor, 0 or 1."""
    preset: Preset = PRESETS[losses.PRESET]
    g1, g2, g3 = (weight * kept for weight, kept in zip(preset.gammas, gammas, strict=True))
    b1, b2, b3 = (weight * kept for weight, kept in zip(preset.betas, betas, strict=True))
    changed = dataclasses.replace(preset, gammas=(g1, g2, g3), betas=(b1, b2, b3))
    return lambda: objectives.mghf(losses.EXTRACTOR, "c", changed)


ROWS = (
    Row(BASE, None, (27.92, 0.7835, 0.2968), (6.02, 5.98, 6.29)),
    Row(
        NAIVE,
        lambda: objectives.mghf(losses.EXTRACTOR, "n"),
        (28.40, 0.7980, 0.2839),
        (5.80, 5.54, 6.02),
    ),
    Row("AWDFE MSE only", _only((0, 1, 0), (1, 0, 0)), (28.50, 0.7971, 0.2818)),
    Row("MGHF-n + AWDFE MSE", _only((1, 1, 0), (1, 0, 0)), (28.40, 0.7991, 0.2737)),
    Row("correlation only", _only((0, 1, 0), (0, 1, 0)), (28.60, 0.7923, 0.2943)),
    Row("CSC", _only((0, 1, 0)), (28.64, 0.7931, 0.2845)),
    Row("MGHF-n + CSC", _only((1, 1, 0)), (28.72, 0.7956, 0.2813)),
    Row("LIP only", _only((0, 0, 1)), (28.68, 0.8008, 0.2793)),
    Row(FULL, _only((1, 1, 1)), (28.87, 0.8057, 0.2713)),
    Row(VGG, objectives.vgg16, None, (5.97, 5.63, 6.15), needs_vgg=True),
    Row(LPIPS, objectives.lpips_vgg, None, (6.06, 5.84, 6.36), needs_vgg=True),
)
"""In the order of training: Table 6 first, then the rows that only Table 4 has."""


def measure(settings: DemoSettings) -> dict[str, Any]:
    """Trains and measures every row; writes no file.

    Returns:
        The content of ``ablation.json``: ``rows`` with the objective's ``name``, ``weight``, mean
        ``quality`` over the held-out photographs, ``step_seconds`` and the paper's figures.

    Raises:
        DemoError: too few usable pictures, a loss that is not finite, or an objective without a
            gradient.
    """
    began = time.perf_counter()
    with pipeline.threads_of(settings):
        setup = pipeline.set_up(settings)
        missing = unavailable_reason()
        rows = [row for row in ROWS if missing is None or not row.needs_vgg]
        ratio = pipeline.gradient_ratio(setup)
        length = ratio * objectives.gradient_length(losses.l1, setup.start, setup.crops())
        start = setup.measure([super_resolve(setup.start, h.lr) for h in setup.held_out])
        found = []
        for row in rows:
            objective: Objective = losses.l1
            weight = 0.0
            if row.build is not None:
                alone = row.build()
                own = objectives.gradient_length(alone, setup.start, setup.crops())
                if not own > 0:
                    raise DemoError(f"{row.name}: its gradient is {own} on the first batches")
                weight = length / own
                objective = objectives.with_l1(alone, weight)
            network = copy.deepcopy(setup.start)
            training = train(
                network,
                setup.crops(),  # the same batches every time
                objective,
                label=row.name,
                steps=settings.steps,
                learning_rate=pipeline.FINE_TUNE_RATE,
            )
            each = setup.measure([super_resolve(network, h.lr) for h in setup.held_out])
            found.append(
                {
                    "name": row.name,
                    "weight": weight,
                    "quality": dataclasses.asdict(Quality.mean(each)),
                    "paper_table_6": row.table6,
                    "paper_table_4": row.table4,
                    "step_seconds": training.median_step_seconds,
                }
            )
        content: dict[str, Any] = {
            "generator": GENERATOR,
            "command": settings.command("--ablation"),
            "note": NOT_COMPARABLE,
            "start": {**setup.describe_start(), "quality": dataclasses.asdict(Quality.mean(start))},
            "steps": settings.steps,
            "batch": settings.batch,
            "patch": settings.patch,
            "seed": settings.seed,
            "learning_rate": pipeline.FINE_TUNE_RATE,
            "extractor": losses.EXTRACTOR,
            "preset": losses.PRESET,
            "mghf_weight": losses.MGHF_WEIGHT,
            "gradient_in_lengths_of_l1": ratio,
            "training_photographs": [p.name for p in setup.collection.training],
            "held_out_photographs": [h.name for h in setup.held_out],
            "rows": found,
            "left_out": [r.name for r in ROWS if r not in rows],
            "why_left_out": missing,
            "machine": pipeline.describe_machine(),
            "seconds": time.perf_counter() - began,
        }
    cleaned: dict[str, Any] = summary.plain(content)
    return cleaned


def _cells(row: dict[str, Any]) -> list[str]:
    q = row["quality"]
    return [
        row["name"],
        f"{row['weight']:.3g}",
        f"{q['psnr']:.2f}",
        f"{q['ssim']:.4f}",
        summary.distance(q["stlpips"]),
        f"{q['hf_error']:.2f}",
        f"{row['step_seconds'] * 1000:.0f} ms",
    ]


def text(result: dict[str, Any]) -> str:
    """Both tables as plain text, each row beside the paper's own figures."""
    head = ["", "weight", "PSNR", "SSIM", "ST-LPIPS", "HF error", "step"]
    six = [[*head, "| paper: PSNR", "SSIM", "LPIPS"]]
    four = [[*head, "| paper: NIQE DIV2K-Val", "RealSet65", "RealSR"]]
    for row in result["rows"]:
        if row["paper_table_6"] is not None:
            psnr, ssim, lpips = row["paper_table_6"]
            six.append([*_cells(row), f"{psnr:.2f}", f"{ssim:.4f}", f"{lpips:.4f}"])
        if row["paper_table_4"] is not None:
            four.append([*_cells(row), *(f"{niqe:.2f}" for niqe in row["paper_table_4"])])
    lines = [
        f"Beside L1, each with a gradient {result['gradient_in_lengths_of_l1']:.2g} times as long "
        f"as L1's; {result['steps']} steps, mean over the held-out photographs "
        f"({', '.join(result['held_out_photographs'])}).",
        "",
        "Table 6: what each term gives (paper: OSEDiff, DRealSR)",
        summary.aligned(six),
        "",
        "Table 4: other perceptual losses (paper: SinSR, NIQE; lower is better)",
        summary.aligned(four),
        "",
        NOT_COMPARABLE,
    ]
    if result["left_out"]:
        lines.append(f"Left out: {', '.join(result['left_out'])}; {result['why_left_out']}.")
    else:
        lines.append(LPIPS_NOTE)
    return "\n".join(lines)
