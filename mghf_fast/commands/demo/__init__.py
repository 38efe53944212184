"""Shows on photographs what MGHF-c does to the outputs of a small super-resolution network.

The shipped compact EDSR, trained on L1, is fine-tuned twice, with the same batches, learning rates
and number of steps: on L1 alone, and on L1 + MGHF-c. Photographs held out from all training are
then measured as by ``mghf-fast evaluate``, and shown. With ``--ablation`` the rows of the paper's
Tables 4 and 6 are trained in the same way.

This package needs the extra ``demo`` (``pip install "mghf_fast[demo]"``); importing it does not.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from .settings import DemoError, DemoSettings

__all__ = ["DemoError", "DemoSettings", "run", "run_ablation"]


def run(settings: DemoSettings | None = None) -> dict[str, Any]:
    """Runs the demo: trains, prints the table, writes the report.

    ``report.html``, ``metrics.json`` and ``comparison.png`` go to ``settings.out``. The global
    random state and the number of threads do not change.

    Args:
        settings: see :class:`DemoSettings`; None for the defaults.

    Returns:
        The content of ``metrics.json``. With the same seed, machine and number of threads
        everything but ``cost`` repeats exactly.

    Raises:
        DemoError: bad settings, too few pictures, or results that cannot be written; the message
            is one line for the user.
        ModuleNotFoundError: a package of the extra ``demo`` is missing.
    """
    from . import crops, output, pipeline, report, summary

    settings = settings or DemoSettings()
    output.prepare(settings.out)
    result = pipeline.compare(settings)
    metrics = summary.to_json(result)

    output.write(settings.out, output.METRICS, json.dumps(metrics, indent=1).encode())
    output.write(settings.out, output.COMPARISON, crops.comparison_strip(result))
    path = output.write(settings.out, output.REPORT, report.render(result).encode())

    print(f"\n{summary.table_text(result)}\n\n{summary.headline(result)}")
    for remark in summary.remarks(result):
        print(remark)
    print(f"\nReport: {path}  (whole run: {result.seconds:.0f} s)")
    sys.stdout.flush()
    return metrics


def run_ablation(settings: DemoSettings | None = None) -> dict[str, Any]:
    """Trains with every objective of the paper's Tables 4 and 6, prints both tables beside the
    paper's figures and writes ``ablation.json`` to ``settings.out``.

    Args:
        settings: see :class:`DemoSettings`; None for the defaults.

    Returns:
        The content of ``ablation.json``; with the same seed, machine and number of threads
        everything but ``seconds`` and ``step_seconds`` repeats exactly.

    Raises:
        DemoError, ModuleNotFoundError: as :func:`run`.
    """
    from . import output
    from .ablation import measure, text

    settings = settings or DemoSettings()
    output.prepare(settings.out, (output.ABLATION,))
    result = measure(settings)
    path = output.write(settings.out, output.ABLATION, json.dumps(result, indent=1).encode())
    print(f"\n{text(result)}\n\nFigures: {path}  (whole run: {result['seconds']:.0f} s)")
    sys.stdout.flush()
    return result
