"""The verdicts, in sentences that are derived from the figures by rule, whatever the outcome.

There are two targets of PSNR. A comparison is won or lost if the intervals at both lie on the same
side of 0, and even otherwise. If an objective does not reach a target, the verdict says so and
concludes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import equal, objectives, quality
from .result import CHOSEN, EQUAL

Result = Mapping[str, Any]

NOT_OPENED = "The test pictures have not been opened yet: nothing is concluded."
GROUP_NAMES = {
    "synthetic": "On the test pictures with the synthetic degradation",
    "real": "On the real degradations (RealSR, DRealSR)",
}
AGAINST = {objectives.L1: "L1 alone", objectives.VGG: "the trained VGG-16 loss"}
THIRD, TENTH = 1 / 3, 0.1


def select(result: Result, part: str = "test", **wanted: Any) -> list[dict[str, Any]]:
    """The test's differences whose fields have these values."""
    rows = result[part]["differences"]
    return [row for row in rows if all(row[key] == wanted[key] for key in wanted)]


def outcome(rows: list[dict[str, Any]]) -> str | None:
    """The outcome of an objective's rows of all targets; None if there are none, or if not every
    seed reached its target."""
    if not rows or any(row["reached"] < 1 for row in rows):
        return None
    outcomes = {row["outcome"] for row in rows}
    return outcomes.pop() if len(outcomes) == 1 else equal.EVEN


def figures(rows: list[dict[str, Any]]) -> str:
    """The figures as ``-0.0123 (-0.0150 to -0.0098) at -0.3 dB; ...``"""
    return "; ".join(
        f"{row['mean']:+.4f} ({row['low']:+.4f} to {row['high']:+.4f}) at -{row['target']:g} dB"
        for row in rows
    )


WORDS = {
    equal.BETTER: "is nearer to the truth than",
    equal.EVEN: "cannot be told from",
    equal.WORSE: "is farther from the truth than",
}


def comparison(result: Result, name: str, against: str, group: str) -> str | None:
    """A sentence on one comparison by the primary judge; None if it was not made.

    It is made at equal PSNR or, if that is not reached, with the networks chosen on the validation
    pictures.
    """
    wanted = {
        "objective": name, "against": against, "group": group, "metric": quality.PRIMARY,
    }  # fmt: skip
    rows = select(result, **wanted, how=EQUAL)
    if not rows:
        return None
    title = result["titles"][name].removeprefix("+ ")
    found = outcome(rows)
    if found is not None:
        return (
            f"{GROUP_NAMES[group]}, at equal PSNR, {title} {WORDS[found]} {AGAINST[against]} by "
            f"ST-LPIPS: {figures(rows)}."
        )
    rows = select(result, **wanted, how=CHOSEN)
    found = outcome(rows)
    assert found is not None
    lost = " and ".join(f"{row['psnr']:+.2f}" for row in rows)
    return (
        f"{GROUP_NAMES[group]} not every seed's networks come to both PSNRs. As chosen on the "
        f"validation pictures, PSNR differing by {lost} dB, {title} {WORDS[found]} "
        f"{AGAINST[against]} by ST-LPIPS: {figures(rows)}."
    )


def _second(result: Result, name: str, against: str, group: str) -> list[dict[str, Any]]:
    """The second judge's rows: at equal PSNR, or else for the networks as chosen."""
    wanted = {
        "objective": name, "against": against, "group": group, "metric": quality.SECOND,
    }  # fmt: skip
    rows = select(result, **wanted, how=EQUAL)
    return rows if outcome(rows) is not None else select(result, **wanted, how=CHOSEN)


def second(result: Result, name: str, group: str) -> str | None:
    """A sentence on the second judge's comparison of the default."""
    parts = []
    for against, other in AGAINST.items():
        rows = _second(result, name, against, group)
        found = outcome(rows)
        if found is not None:
            how = ", as chosen" if rows[0]["how"] == CHOSEN else ""
            parts.append(f"it {WORDS[found]} {other} ({figures(rows)}{how})")
    if not parts:
        return None
    where = GROUP_NAMES[group][0].lower() + GROUP_NAMES[group][1:]
    return f"By the second judge, EfficientNet-Lite2's features, {where} {' and '.join(parts)}."


def cost(result: Result, name: str) -> str | None:
    rows = {row["objective"]: row for row in (result["cost"] or {"rows": []})["rows"]}
    if name not in rows or "of_vgg" not in rows[name]:
        return None
    ratio = rows[name]["of_vgg"]
    how = (
        "a tenth of the VGG-16 loss's or less"
        if ratio <= TENTH
        else "a third of the VGG-16 loss's or less"
        if ratio <= THIRD
        else "more than a third of the VGG-16 loss's"
    )
    return f"Its step takes {ratio:.2g} times as long as the VGG-16 loss's on this CPU: {how}."


def headline(result: Result, name: str) -> str:
    """Whether the default was worth its name, in one sentence."""
    title = result["titles"][name].removeprefix("+ ")
    found = {
        against: outcome(
            select(
                result,
                objective=name,
                against=against,
                group="synthetic",
                metric=quality.PRIMARY,
                how=EQUAL,
            )
        )
        for against in AGAINST
    }
    base, vgg = found[objectives.L1], found[objectives.VGG]
    if base is None:
        return f"Nothing is concluded on {title}: its networks do not lose the PSNR asked for."
    if base != equal.BETTER:
        return (
            f"{title} is not worth its PSNR: at equal loss of it the pictures are not nearer to "
            "the truth than L1's."
        )
    ends = {
        equal.BETTER: "and it beats the trained VGG-16 loss",
        equal.EVEN: "and the trained VGG-16 loss is no better and no worse",
        equal.WORSE: "but the trained VGG-16 loss is better still",
        None: "and how it stands to the trained VGG-16 loss is open",
    }
    doubt = {
        equal.BETTER: "; the second judge agrees that L1's are farther.",
        equal.EVEN: "; the second judge cannot tell it from L1.",
        equal.WORSE: "; the second judge sees it otherwise: for it L1's are nearer.",
        None: ".",
    }[outcome(_second(result, name, objectives.L1, "synthetic"))]
    return (
        f"At equal PSNR {title} brings L1's pictures nearer to the truth by ST-LPIPS, "
        f"{ends[vgg]}{doubt}"
    )


def verdict(result: Result) -> str:
    """The page's block."""
    if result["test"] is None:
        return f"**{NOT_OPENED}**\n"
    name = objectives.DEFAULT
    if name not in result["titles"]:
        return "**The default loss is not among this study's objectives.**\n"
    sentences = [
        comparison(result, name, against, group) for group in GROUP_NAMES for against in AGAINST
    ]
    sentences += [second(result, name, group) for group in GROUP_NAMES]
    sentences.append(cost(result, name))
    items = "\n".join(f"* {sentence}" for sentence in sentences if sentence is not None)
    return f"**{headline(result, name)}**\n\n{items}\n"
