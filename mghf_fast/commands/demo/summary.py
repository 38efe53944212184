"""A run in words: the table and the sentences shown in both terminal and report."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from . import losses, pipeline
from .metrics import BAND, RADIAL_BINS, Quality
from .output import GENERATOR
from .pipeline import BICUBIC, L1, METHODS, MGHF, START, Result

EVALUATE = 'pip install "mghf_fast[evaluate]"'

# "Start" is the network from which both trainings begin.
METHOD_LABELS = {
    BICUBIC: "bicubic",
    START: "start",
    L1: "L1 alone",
    MGHF: "L1 + MGHF-c",
}

COLUMNS = (
    ("", ""),
    ("PSNR", "dB, luma in the papers' convention; higher is better"),
    ("SSIM", "the same; higher is better"),
    ("ST-LPIPS", "shift-tolerant LPIPS, AlexNet; lower is better"),
    ("HF error", "mean distance of the power spectra above LR's Nyquist, dB; lower is better"),
    ("HF energy", "energy above LR's Nyquist, SR / GT; 1 is ideal"),
    ("HF corr", "correlation with GT above LR's Nyquist; higher is better"),
    ("sharpness", "mean gradient magnitude, SR / GT; 1 is ideal"),
    ("step", "median time of a training step"),
    ("in loss", "share of the step spent in the loss, forward and backward"),
    ("memory", "peak rise of the process's resident memory during the training"),
)

DIFFERENCE = 0.01
"""Relative change of the main measure below which two methods count as equal."""

BETTER, WORSE, EQUAL = "better", "worse", "no difference"


def distance(value: float | None) -> str:
    """ST-LPIPS as text."""
    return "n/a" if value is None else f"{value:.4f}"


def table(result: Result) -> list[list[str]]:
    """One row of texts per method, in the order of ``COLUMNS``."""
    rows = []
    for method in METHODS:
        q = result.mean(method)
        row = [
            METHOD_LABELS[method],
            f"{q.psnr:.2f}",
            f"{q.ssim:.4f}",
            distance(q.stlpips),
            f"{q.hf_error:.2f}",
            f"{q.hf_energy:.3f}",
            f"{q.hf_correlation:.3f}",
            f"{q.sharpness:.3f}",
        ]
        if method in result.trainings:
            training = result.trainings[method]
            memory = training.memory_bytes
            row += [
                f"{training.median_step_seconds * 1000:.0f} ms",
                f"{training.loss_share * 100:.0f} %",
                "n/a" if memory is None else f"{memory / 2**20:.0f} MiB",
            ]
        else:
            row += ["-", "-", "-"]
        rows.append(row)
    return rows


def table_text(result: Result) -> str:
    """The table as aligned plain text, with explanations of the columns below it."""
    notes = [f"  {title}: {note}" for title, note in COLUMNS if note]
    return "\n".join([aligned([[title for title, _ in COLUMNS], *table(result)]), "", *notes])


def aligned(rows: list[list[str]]) -> str:
    """Rows of texts as plain text with a rule below the first row: the first column is aligned to
    the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def deciding(quality: Quality) -> float:
    """The measure that decides which picture is better, lower is better: ST-LPIPS, or without its
    package the error of the high-frequency spectrum."""
    return quality.hf_error if quality.stlpips is None else quality.stlpips


def verdict(result: Result) -> str:
    """``BETTER``, ``WORSE`` or ``EQUAL``: MGHF-c against L1 alone, by the mean of the main measure
    over the held-out photographs; a change of less than ``DIFFERENCE`` counts as equal."""
    mghf, l1 = (deciding(result.mean(method)) for method in (MGHF, L1))
    if abs(mghf - l1) <= DIFFERENCE * l1:
        return EQUAL
    return BETTER if mghf < l1 else WORSE


def headline(result: Result) -> str:
    """Whether MGHF-c is better or worse, with the figures and the cost in PSNR."""
    mghf, l1 = result.mean(MGHF), result.mean(L1)
    wins = sum(
        deciding(m) < deciding(n)
        for m, n in zip(result.quality[MGHF], result.quality[L1], strict=True)
    )
    count = len(result.held_out)
    photographs = "held-out photograph" if count == 1 else f"{count} held-out photographs"
    if result.judged:
        measure = f"ST-LPIPS {distance(mghf.stlpips)} against {distance(l1.stlpips)}"
    else:
        measure = f"high-frequency error {mghf.hf_error:.2f} dB against {l1.hf_error:.2f} dB"
    found = verdict(result)
    answer = {
        BETTER: "MGHF-c is better than L1 alone",
        WORSE: "MGHF-c is worse than L1 alone",
        EQUAL: "MGHF-c makes no difference to L1 alone",
    }[found]
    change = round(mghf.psnr - l1.psnr, 2)
    if change < 0:
        price = f"for {-change:.2f} dB less PSNR"
    elif change > 0:
        price = f"with {change:.2f} dB more PSNR"
    else:
        price = "at the same PSNR"
    return (
        f"{answer}: {measure} (lower is better), {price}, on average over the {photographs} "
        f"(lower on {wins} of {count})."
    )


def remarks(result: Result) -> list[str]:
    """The remarks without which the headline would mislead."""
    mghf, l1 = result.mean(MGHF), result.mean(L1)

    def change(delta: float, digits: int) -> str:
        return f"{delta:+.{digits}f}".replace("-", "\N{MINUS SIGN}")

    lines = [
        f"From L1 to MGHF-c: PSNR {change(mghf.psnr - l1.psnr, 2)} dB, "
        f"SSIM {change(mghf.ssim - l1.ssim, 4)}, "
        f"high-frequency spectral error {change(mghf.hf_error - l1.hf_error, 2)} dB, "
        f"correlation within the band {change(mghf.hf_correlation - l1.hf_correlation, 3)}, "
        f"energy in it {l1.hf_energy * 100:.1f} % of the ground truth's with L1 alone and "
        f"{mghf.hf_energy * 100:.1f} % with MGHF-c."
    ]
    if not result.judged:
        lines.append(
            "ST-LPIPS was not measured, so the spectrum decided, which is no measure of human "
            f"perception; {EVALUATE} gives it."
        )
    if max(mghf.hf_energy, l1.hf_energy) > 1:
        lines.append("An energy above 100 % is more than the ground truth has: too much, not more.")
    slow, fast = (result.trainings[m].median_step_seconds for m in (MGHF, L1))
    lines.append(
        f"A step with MGHF-c took {slow * 1000:.0f} ms, one with L1 alone {fast * 1000:.0f} ms "
        f"({slow / fast:.1f} times as long)."
    )
    return lines


def to_json(result: Result) -> dict[str, Any]:
    """Every number of the run, in types that JSON has; NaN and infinity become None."""
    settings = result.settings
    trainings = list(result.trainings.values())
    if result.setup.pretraining is not None:
        trainings.insert(0, result.setup.pretraining)
    content: dict[str, Any] = {
        "generator": GENERATOR,
        "headline": headline(result),
        "verdict": verdict(result),
        "decided_by": "stlpips" if result.judged else "hf_error",
        "command": settings.command(),
        "settings": {
            **asdict(settings),
            "out": str(settings.out),
            "images": None if settings.images is None else str(settings.images),
            "start": result.setup.describe_start(),
            "extractor": losses.EXTRACTOR,
            "preset": losses.PRESET,
            "mghf_weight": losses.MGHF_WEIGHT,
            "mghf_gradient_in_lengths_of_l1": result.gradient_ratio,
            "pretrain_learning_rate": pipeline.PRETRAIN_RATE,
            "fine_tune_learning_rate": pipeline.FINE_TUNE_RATE,
            "network_parameters": result.parameters,
        },
        "training_photographs": [p.name for p in result.collection.training],
        "held_out_photographs": [h.name for h in result.held_out],
        "skipped": [{"file": f, "reason": r} for f, r in result.collection.skipped],
        "left_unread": result.collection.unread,
        "quality": {
            method: {
                "mean": asdict(result.mean(method)),
                "each": {
                    h.name: asdict(q)
                    for h, q in zip(result.held_out, result.quality[method], strict=True)
                },
            }
            for method in METHODS
        },
        "spectrum": {
            "band_from_cycles_per_pixel": BAND,
            "bins": RADIAL_BINS,
            "power": {name: list(power) for name, power in result.spectra.items()},
        },
        "training": {
            training.label: {
                "terms": training.terms,
                "checkpoints": training.checkpoints,
                "held_out_terms": training.held_out_terms,
                "held_out_quality": [asdict(q) for q in training.quality],
            }
            for training in trainings
        },
        "cost": {
            "total_seconds": result.seconds,
            **{
                training.label: {
                    "median_step_seconds": training.median_step_seconds,
                    "loss_share": training.loss_share,
                    "peak_memory_rise_bytes": training.memory_bytes,
                }
                for training in trainings
            },
        },
        "machine": result.machine,
    }
    cleaned: dict[str, Any] = plain(content)
    return cleaned


def plain(value: Any) -> Any:
    """``value`` in types that JSON has; NaN and infinity become None."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value
