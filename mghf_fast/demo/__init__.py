"""Real photographs, a small super-resolution network, and the question whether MGHF-c restores
more high-frequency detail than L1 alone.

A compact EDSR is trained from scratch on L1 for a moment. From that start it is fine-tuned twice,
with the same batches, learning rates and number of steps: on L1 alone, and on
``L1 + MGHF-c`` with the published weights. Photographs held out from all training are then
measured and shown.

This package needs the extra ``demo`` (``pip install "mghf_fast[demo]"``); importing it does not.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from .settings import DemoError, DemoSettings

__all__ = ["DemoError", "DemoSettings", "run"]


def run(settings: DemoSettings | None = None) -> dict[str, Any]:
    """Runs the demo: trains, prints the table, writes the report.

    ``report.html``, ``metrics.json`` and ``comparison.png`` go to ``settings.out``. The global
    random state and the number of threads are left as they were.

    Args:
        settings: see :class:`DemoSettings`; None for the defaults.

    Returns:
        What ``metrics.json`` holds. With one seed, machine and number of threads everything but
        ``cost`` repeats exactly.

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
