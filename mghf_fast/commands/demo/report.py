"""``report.html``: one self-contained file without scripts."""

from __future__ import annotations

import base64
import html
import math

from . import losses, pipeline, summary
from .charts import Line, line_chart, smooth
from .crops import COLUMNS, crops, png
from .degradation import BLUR_SIGMA, JPEG_QUALITY, NOISE_SIGMA
from .metrics import BAND
from .network import START_NAME
from .objectives import FIRST_BATCHES
from .output import GENERATOR
from .pipeline import GROUND_TRUTH, L1, MGHF, START, Result

STYLES = {START: "start", L1: "l1", MGHF: "mghf", GROUND_TRUTH: "gt"}

CSS = """
:root { color-scheme: light dark; --page: #fbfbfa; --card: #fff; --text: #1d2126; --muted: #5d6670;
  --rule: #e2e5e8; --start: #8a929b; --l1: #2463c9; --mghf: #d4500c; --gt: #1d2126; }
@media (prefers-color-scheme: dark) { :root { --page: #15181c; --card: #1d2126; --text: #e8eaed;
  --muted: #a3abb5; --rule: #343a42; --start: #8d96a0; --l1: #6ea3f7; --mghf: #ff9152;
  --gt: #e8eaed; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1320px; margin: 0 auto; padding: 32px 16px 64px; }
h1 { font-size: clamp(1.5rem, 4vw, 2.1rem); line-height: 1.2; margin: 0 0 8px; }
h2 { font-size: 1.25rem; margin: 48px 0 8px; }
h3 { font-size: 1rem; margin: 24px 0 8px; }
p { margin: 8px 0; max-width: 75ch; }
.lead { font-size: 1.1rem; }
.muted, figcaption, .legend { color: var(--muted); font-size: .87rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px;
  margin: 24px 0; }
.card { background: var(--card); border: 1px solid var(--rule); border-top: 4px solid var(--c);
  border-radius: 6px; padding: 12px 16px; }
.card b { display: block; font-size: 1.9rem; line-height: 1.2; }
.start { --c: var(--start); } .l1 { --c: var(--l1); }
.mghf { --c: var(--mghf); } .gt { --c: var(--gt); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 6px 10px; border-bottom: 1px solid var(--rule);
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th { font-size: .85rem; color: var(--muted); font-weight: 600; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 16px; font-size: .92rem; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; }
.crops { display: grid; grid-template-columns: repeat(4, 1fr); gap: 8px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr));
  gap: 20px; }
@media (max-width: 640px) { .crops { grid-template-columns: repeat(2, 1fr); }
  dl { grid-template-columns: 1fr; } dt { margin-top: 6px; } }
figure { margin: 0; min-width: 0; }
.crops img { width: 100%; height: auto; image-rendering: pixelated; display: block;
  border-radius: 3px; }
figcaption b { color: var(--text); }
.wide { max-width: 640px; }
.chart { width: 100%; height: auto; display: block; }
.chart text { font-size: 12px; fill: var(--muted); paint-order: stroke; stroke: var(--page);
  stroke-width: 3px; }
.grid { stroke: var(--rule); } .axis { stroke: var(--muted); }
.band { fill: var(--mghf); opacity: .08; }
.line { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round; }
.faint { stroke-width: 1; opacity: .25; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; }
.legend i { display: inline-block; width: 16px; height: 3px; background: var(--c);
  vertical-align: middle; margin-right: 6px; }
code { font-size: .9em; overflow-wrap: anywhere; }
"""


def _text(value: object) -> str:
    return html.escape(str(value))


def _image(content: bytes, side: int, alt: str) -> str:
    data = base64.b64encode(content).decode()
    return (
        f'<img src="data:image/png;base64,{data}" width="{side}" height="{side}" '
        f'alt="{_text(alt)}">'
    )


def _cards(result: Result) -> str:
    measure = "ST-LPIPS" if result.judged else "dB of high-frequency error"
    cards = []
    for method, label in summary.METHOD_LABELS.items():
        if method not in STYLES:
            continue
        q = result.mean(method)
        value = summary.distance(q.stlpips) if result.judged else f"{q.hf_error:.2f}"
        cards.append(
            f'<div class="card {STYLES[method]}">{label}<b>{value}</b>'
            f'<span class="muted">{measure}, lower is better; PSNR {q.psnr:.2f} dB</span></div>'
        )
    return f'<div class="cards">{"".join(cards)}</div>'


def _crops(result: Result) -> str:
    parts = []
    for index, photograph in enumerate(result.held_out):
        figures = []
        for method, pixels in crops(result, index).items():
            label = COLUMNS[method]
            caption = ""
            if method in result.quality:
                q = result.quality[method][index]
                judged = "" if q.stlpips is None else f"ST-LPIPS {q.stlpips:.3f}, "
                energy = f"HF energy {q.hf_energy * 100:.1f} %"
                caption = f"<br>{judged}{q.psnr:.2f} dB, {energy}"
            image = _image(png(pixels), photograph.side, f"{photograph.name}, {label}")
            figures.append(
                f"<figure>{image}<figcaption><b>{_text(label)}</b>{caption}</figcaption></figure>"
            )
        parts.append(
            f"<h3>{_text(photograph.name)}</h3><div class='crops'>{''.join(figures)}</div>"
        )
    return "".join(parts)


def _table(result: Result) -> str:
    head = "".join(
        f'<th scope="col" title="{_text(note)}">{_text(t)}</th>' for t, note in summary.COLUMNS
    )
    rows = "".join(
        "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>"
        for row in summary.table(result)
    )
    notes = "; ".join(f"<b>{t}</b>: {_text(note)}" for t, note in summary.COLUMNS if note)
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
        f'</div><p class="muted">{notes}.</p>'
    )


def _term_chart(result: Result, term: str, name: str, methods: tuple[str, ...]) -> str:
    lines = []
    for method in methods:
        values = result.trainings[method].terms[term]
        steps = list(range(1, len(values) + 1))
        style = STYLES[method]
        lines.append(Line(COLUMNS[method], style, steps, values, faint=True))
        lines.append(Line(COLUMNS[method], style, steps, smooth(values, max(3, len(values) // 8))))
    chart = line_chart(lines, "fine-tuning step", name, description=f"{name} at every step")
    return f"<figure>{chart}<figcaption>{_text(name)}</figcaption></figure>"


def _quality_chart(result: Result, attribute: str, name: str, caption: str) -> str:
    lines = [
        Line(
            COLUMNS[method],
            STYLES[method],
            training.checkpoints,
            [getattr(q, attribute) for q in training.quality],
        )
        for method, training in result.trainings.items()
    ]
    chart = line_chart(lines, "fine-tuning step", name, description=caption)
    return f"<figure>{chart}<figcaption>{_text(caption)}</figcaption></figure>"


def _held_out_term_chart(result: Result, term: str, name: str) -> str:
    lines = [
        Line(COLUMNS[method], STYLES[method], training.checkpoints, training.held_out_terms[term])
        for method, training in result.trainings.items()
    ]
    chart = line_chart(lines, "fine-tuning step", name, description=name)
    return f"<figure>{chart}<figcaption>{_text(name)}</figcaption></figure>"


def _spectrum_chart(result: Result) -> str:
    frequency = result.spectra["frequency"]
    lines = [
        Line(
            COLUMNS[name],
            STYLES[name],
            frequency,
            [10 * math.log10(max(power, 1e-12)) for power in result.spectra[name]],
        )
        for name in (GROUND_TRUTH, START, L1, MGHF)
    ]
    chart = line_chart(
        lines,
        "frequency (cycles per pixel)",
        "power (dB)",
        description="Radially averaged power spectra",
        band=(BAND, 0.5, "above LR's Nyquist"),
    )
    return f'<figure class="wide">{chart}</figure>'


def _definitions(pairs: list[tuple[str, object]]) -> str:
    return f"<dl>{''.join(f'<dt>{_text(k)}</dt><dd>{_text(v)}</dd>' for k, v in pairs)}</dl>"


def _start(result: Result) -> str:
    if result.setup.pretraining is None:
        return f"the network that ships, trained on L1 ({START_NAME} of mghf_fast.weights)"
    return (
        f"from scratch: {result.settings.pretrain_steps} steps on L1, Adam, learning rate "
        f"{pipeline.PRETRAIN_RATE:g}"
    )


def _settings(result: Result) -> str:
    s, collection = result.settings, result.collection
    skipped = f"{len(collection.skipped)} files" if collection.skipped else "none"
    return _definitions(
        [
            ("command", s.command()),
            ("seed", s.seed),
            ("trained on", ", ".join(p.name for p in collection.training)),
            ("held out", ", ".join(h.name for h in result.held_out)),
            ("skipped", skipped),
            (
                "degradation",
                f"Gaussian blur, \N{GREEK SMALL LETTER SIGMA} {BLUR_SIGMA[0]} to {BLUR_SIGMA[1]} "
                "pixels on each axis, half of them anisotropic and turned; area or bicubic "
                f"downsampling by 4; Gaussian noise, \N{GREEK SMALL LETTER SIGMA} up to "
                f"{NOISE_SIGMA[1]:g}/255; JPEG, quality {JPEG_QUALITY[0]} to {JPEG_QUALITY[1]}",
            ),
            ("network", f"compact EDSR, {result.parameters:,} parameters"),
            ("start", _start(result)),
            (
                "fine-tuning",
                f"{s.steps} steps each, Adam, learning rate {pipeline.FINE_TUNE_RATE:g}, from the "
                "same start on the same batches",
            ),
            ("batches", f"{s.batch} crops of {s.patch} x {s.patch}, flipped and turned"),
            (
                "objective",
                f"L1 alone; L1 + {losses.MGHF_WEIGHT:g} x MGHF-c, whose gradient on the "
                f"super-resolved picture, weight included, is {result.gradient_ratio:.2g} times as "
                f"long as L1's on the first {FIRST_BATCHES} batches",
            ),
            ("MGHF-c", f'preset "{losses.PRESET}", frozen extractor "{losses.EXTRACTOR}"'),
            ("whole run", f"{result.seconds:.0f} s"),
            *result.machine.items(),
        ]
    )


def render(result: Result) -> str:
    """The report as HTML."""
    remarks = "".join(f"<p>{_text(r)}</p>" for r in summary.remarks(result))
    held_out = "Mean over the held-out photographs while fine-tuning"
    terms = result.trainings[MGHF]
    # A preset may omit terms, and the distance needs its package.
    names = {
        "stlpips": "ST-LPIPS on held-out crops",
        "mghf": "MGHF-c on held-out crops",
        "lip": "LIP term on held-out crops",
    }
    trained = {
        "naive": "MGHF-n term on the training batches",
        "csc": "CSC term on the training batches",
        "lip": "LIP term on the training batches",
    }
    charts = "".join(
        [
            _quality_chart(result, "psnr", "PSNR (dB)", f"{held_out}: PSNR"),
            _quality_chart(result, "hf_energy", "HF energy, SR / GT", f"{held_out}: HF energy"),
            *(
                _held_out_term_chart(result, term, name)
                for term, name in names.items()
                if term in terms.held_out_terms
            ),
            _term_chart(result, "l1", "L1 on the training batches", (L1, MGHF)),
            *(
                _term_chart(result, term, name, (MGHF,))
                for term, name in trained.items()
                if term in terms.terms
            ),
        ]
    )
    side = result.held_out[0].side
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="generator" content="{GENERATOR}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>MGHF-c against L1 alone</title><style>{CSS}</style></head><body><main>
<h1>What does MGHF-c do that L1 alone does&nbsp;not?</h1>
<p class="lead">{_text(summary.headline(result))}</p>
{_cards(result)}
{remarks}
<p class="muted">A small super-resolution network that was trained on L1 was fine-tuned twice
from the same start: on L1, and on L1 with MGHF-c. PSNR rewards the mean of all pictures that fit
the input, which is blurred; ST-LPIPS (a distance tuned on human judgements, where its package is
installed) measures how similar two pictures look. &ldquo;High frequency&rdquo; (HF) is everything
above {BAND:g} cycles per pixel, which a picture four times smaller cannot represent: the network
has added all of it. More energy is not better in itself: the correlation says how much of it is in
the right place.</p>
<h2>Held-out photographs</h2>
<p class="muted">Each photograph's {side} x {side} window with the strongest gradients in the ground
truth, enlarged without smoothing. The figures below the crops are those of the whole
photograph.</p>
{_crops(result)}
<h2>Figures</h2>
{_table(result)}
<h2>Power spectrum</h2>
<p class="muted">Mean over the held-out photographs, luminance, averaged over all directions.</p>
{_spectrum_chart(result)}
<h2>While fine-tuning</h2>
<p class="muted">On the held-out photographs (the loss: on the crops shown above) at
{result.settings.checkpoints} checkpoints; on the training batches at every step, with the moving
average as a thick line. Each batch has other crops and another degradation, hence the jumps, which
are the same in both trainings. Terms are shown without their weights.</p>
<div class="charts">{charts}</div>
<h2>How to repeat this</h2>
<p class="muted">Same seed, machine and number of threads: same figures, times and memory
excepted.</p>
{_settings(result)}
</main></body></html>
"""
