"""What the figures say, in words that follow from them: better, worse or no different than random.

*Better* means above the interval in which one more random extractor would lie in 95 of 100 cases,
mean +- t s sqrt(1 + 1/n) of the n measured ones (Student's t; but a difference of less than a
margin counts for nothing). Of paired differences: their mean's 95 % interval leaves out 0.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .finetuning import L1, MATCHED
from .inversion import MOST_DB
from .subjects import RANDOM, TRAINED

WINS, EVEN, LOSES = "wins", "is even", "loses"
PARTS = ("retrieval", "inversion", "sensitivity", "fine-tuning")


class Verdict(NamedTuple):
    """``outcome`` is WINS, EVEN or LOSES, of the trained extractor against random ones."""

    outcome: str
    text: str


def select(part: Mapping[str, Any], **wanted: Any) -> list[dict[str, Any]]:
    return [row for row in part["rows"] if all(row[key] == wanted[key] for key in wanted)]


# Two-sided 95 % quantiles of Student's t, by degrees of freedom; the last for all above.
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)


def student(count: int) -> float:
    """For ``count`` values, two at least."""
    return STUDENT[min(count - 1, len(STUDENT)) - 1]


def against(trained: float, random: Sequence[float], margin: float) -> str:
    """Of one value among random ones of which more is better; EVEN for fewer than two."""
    if len(random) < 2:
        return EVEN
    spread = statistics.stdev(random) * (1 + 1 / len(random)) ** 0.5
    difference = trained - statistics.fmean(random)
    if abs(difference) <= max(margin, student(len(random)) * spread):
        return EVEN
    return WINS if difference > 0 else LOSES


def together(outcomes: Sequence[str]) -> str:
    """The outcome of several measures: theirs if they agree (EVEN counts for either), else EVEN."""
    wins, loses = WINS in outcomes, LOSES in outcomes
    if wins and not loses:
        return WINS
    return LOSES if loses and not wins else EVEN


def span(values: Sequence[float], digits: int, factor: float = 1.0) -> str:
    """Mean, and the range if there is one."""
    mean, low, high = (factor * f(values) for f in (statistics.fmean, min, max))
    text = f"{mean:.{digits}f}"
    return text if len(values) < 2 else f"{text} ({low:.{digits}f} to {high:.{digits}f})"


COMPARED = {
    WINS: "more than chance gives random ones",
    EVEN: "within what chance gives random ones",
    LOSES: "less than chance gives random ones",
}
QUESTIONS = {
    "region": "neighbour of the same region",
    "photograph": "of the same photograph",
    "probe": "linear probe",
}
SHARE, DECIBELS = 0.01, 0.5
"""Margins."""


def retrieval(part: Mapping[str, Any]) -> Verdict:
    found, outcomes = [], []
    for key, name in QUESTIONS.items():
        trained = select(part, subject=TRAINED, images="grey")[0][key]
        random = [row[key] for row in select(part, subject=RANDOM, images="grey")]
        # Two standard errors of a share of so many crops: with other photographs it were another.
        count = part["crops_probed" if key == "probe" else "crops"]
        share = statistics.fmean(random)
        outcomes.append(against(trained, random, 2 * (share * (1 - share) / count) ** 0.5))
        found.append(
            f"{name} {100 * trained:.1f} % against {span(random, 1, 100)} % "
            f"({COMPARED[outcomes[-1]]})"
        )
    return Verdict(together(outcomes), f"without colour, {'; '.join(found)}.")


def _psnr(part: Mapping[str, Any], subject: str, how: str) -> list[float]:
    return [statistics.fmean(row["psnr"]) for row in select(part, subject=subject, how=how)]


def inversion(part: Mapping[str, Any]) -> Verdict:
    exact, descent = (_psnr(part, TRAINED, how)[0] for how in ("exact", "descent"))
    outcomes = [
        against(_psnr(part, TRAINED, how)[0], _psnr(part, RANDOM, how), DECIBELS)
        for how in ("exact, bfloat16", "descent")
    ]
    vgg = {
        row["subject"]: statistics.fmean(row["psnr"])
        for row in part["rows"]
        if row["subject"].startswith("VGG")
    }
    above = [name for name, value in vgg.items() if descent > value + DECIBELS]
    listed = ", ".join(f"{name} {value:.1f} dB" for name, value in vgg.items())
    return Verdict(
        together(outcomes),
        f"the inverse gives the photographs back at {exact:.0f} dB (of at most {MOST_DB:.0f}); by "
        f"descent the trained features give {descent:.1f} dB, random ones "
        f"{span(_psnr(part, RANDOM, 'descent'), 1)} dB. That is more than {len(above)} of "
        f"{len(vgg)} layers of VGG-16's layout give on the same budget ({listed}).",
    )


def agreement(row: Mapping[str, Any]) -> float:
    """Over all distortions."""
    agreed, pairs = (sum(o[i] for o in row["order"].values()) for i in (0, 1))
    return agreed / pairs


def sensitivity(part: Mapping[str, Any]) -> Verdict:
    (trained,) = select(part, subject=TRAINED, metric="MGHF-n")
    random = select(part, subject=RANDOM, metric="MGHF-n")
    outcome = against(agreement(trained), [agreement(row) for row in random], SHARE)
    others = {name: v for name, v in trained["response"].items() if name != "noise"}
    most, least = (f(others, key=lambda n: others[n]) for f in (max, min))
    span_random = [row["response"][most] for row in random]
    coarse = {
        name: [r["response"][0] for r in part["octaves"] if r["subject"] == name]
        for name in (TRAINED, RANDOM)
    }
    return Verdict(
        outcome,
        f"MGHF-n orders {100 * agreement(trained):.1f} % of the pairs of levels as stated, with "
        f"random features {span([agreement(r) for r in random], 1, 100)} %; at equal PSNR the "
        f"trained one counts {most} {others[most]:.2f} times as much as noise (random ones "
        f"{span(span_random, 2)}) and {least} {others[least]:.2f} times. The trained features "
        f"answer to noise of the coarsest octave {span(coarse[TRAINED], 3)} times as much as to "
        f"the finest, random ones {span(coarse[RANDOM], 2)} times.",
    )


MEASURES = {
    "hf_correlation": ("correlation of the detail with the truth", 1, 3),
    "hf_error": ("spectral error, dB", -1, 2),
    "psnr": ("PSNR, dB", 1, 2),
    "ssim": ("SSIM", 1, 4),
}
"""Name, whether more is better, digits. The first two are what a perceptual loss is for."""


def paired(part: Mapping[str, Any], first: str, second: str, key: str) -> list[float]:
    """``first`` less ``second``, seed by seed."""
    by_seed = {row["seed"]: row[key] for row in select(part, objective=second)}
    return [row[key] - by_seed[row["seed"]] for row in select(part, objective=first)]


def consistent(differences: Sequence[float], sign: int) -> str:
    """Of paired differences; ``sign`` says whether more is better. EVEN for fewer than two."""
    if len(differences) < 2:
        return EVEN
    mean = statistics.fmean(differences)
    error = statistics.stdev(differences) / len(differences) ** 0.5
    if abs(mean) <= student(len(differences)) * error:
        return EVEN
    return WINS if sign * mean > 0 else LOSES


def fine_tuning(part: Mapping[str, Any]) -> Verdict:
    outcomes, found = [], []
    for key in ("hf_correlation", "hf_error"):
        name, sign, digits = MEASURES[key]
        differences = paired(part, MATCHED, RANDOM, key)
        outcomes.append(consistent(differences, sign))
        found.append(
            f"{name} {statistics.fmean(differences):+.{digits}f} (better in "
            f"{sum(sign * d > 0 for d in differences)} of {len(differences)} seeds)"
        )
    energy = {
        name: statistics.fmean(row["hf_energy"] for row in select(part, objective=name))
        for name in (L1, RANDOM, TRAINED, MATCHED)
    }
    return Verdict(
        together(outcomes),
        f"with gradients of one length, trained less random: {'; '.join(found)}. Of the truth's "
        f"high-frequency energy the pictures hold {100 * energy[MATCHED]:.1f} %, with random "
        f"features {100 * energy[RANDOM]:.1f} %, with L1 alone {100 * energy[L1]:.1f} %, with "
        f"trained ones at the preset's own weight {100 * energy[TRAINED]:.1f} %.",
    )


VERDICTS = {
    "retrieval": retrieval,
    "inversion": inversion,
    "sensitivity": sensitivity,
    "fine-tuning": fine_tuning,
}


def headline(found: Mapping[str, Verdict]) -> str:
    """All parts in a sentence."""
    if not found:
        return "Nothing has been measured yet."

    def named(outcome: str) -> str:
        names = [part for part, verdict in found.items() if verdict.outcome == outcome]
        return f"{len(names)}" + (f" ({', '.join(names)})" if names else "")

    text = (
        f"Against random extractors of its shape the trained one wins {named(WINS)} of "
        f"{len(found)} measured parts, loses {named(LOSES)} and is even in {named(EVEN)}."
    )
    if "fine-tuning" in found and found["fine-tuning"].outcome != WINS:
        text += (
            " Super-resolved pictures do not get better by it: whatever the other parts say, in "
            "this training the random extractor would have done."
        )
    return text
