"""Finds out what this installation can do on this machine, and why not the rest."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from ... import cache, native, trials
from ...backends import (
    BACKENDS,
    available_backends,
    triton_is_interpreted,
    unavailable_reasons,
)
from ...ops import OPS
from ..machine import machine_facts

TOLERANCE = 1e-5
"""Largest relative L2 error of a float32 plan against the float64 reference."""

PACKAGES = ("torch", "triton", "numpy", "safetensors")


def op_backends() -> dict[str, dict[str, str | None]]:
    """op name -> backend -> why that backend cannot run it here, or ``None`` if it can."""
    return {name: {b: op.why_not(b) for b in BACKENDS} for name, op in sorted(OPS.items())}


def self_check() -> dict[str, dict[str, Any]]:
    """Runs a small float32 Sinkhorn plan on every backend that has it.

    Returns:
        backend -> ``error`` (relative L2 error against the float64 reference), ``passed``, and
        ``message`` (``None``, or the error it raised).
    """
    op = OPS["sinkhorn"]
    vectors = torch.randn(4, 50, 16, generator=torch.Generator().manual_seed(0))
    query, key = torch.nn.functional.normalize(vectors, dim=2).chunk(2)
    similarity = query @ key.mT
    exact = op.implementation("reference").forward
    expected = exact(similarity.double(), "hard", 0.1, 50, None)
    results: dict[str, dict[str, Any]] = {}
    for backend in BACKENDS:
        on_gpu = backend == "cuda" or (backend == "triton" and not triton_is_interpreted())
        if op.why_not(backend) is not None:
            continue
        try:
            tensor = similarity.to("cuda" if on_gpu else "cpu")
            plan = op.choose(backend, tensor).forward(tensor, "hard", 0.1, 50, None)
            error = float((plan.double().cpu() - expected).norm() / expected.norm())
            results[backend] = {"error": error, "passed": error <= TOLERANCE, "message": None}
        except Exception as problem:
            message = f"{type(problem).__name__}: {problem}"
            results[backend] = {"error": None, "passed": False, "message": message}
    return results


def instruction_set() -> str | None:
    """The one that the CPU kernels use here, or ``None`` without them, or if a wrong
    MGHF_CPU_CAPABILITY leaves them none, which the self-check reports."""
    try:
        return native.cpu_capability()
    except RuntimeError:
        return None


def gpus() -> list[dict[str, Any]]:
    """The cached facts about each NVIDIA GPU: ``identity``, ``tuned`` (when `mghf-fast tune` ran,
    or None) with its ``rules``, and the trials (see :func:`mghf_fast.trials.listed`)."""
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        table = cache.known(device).get("tuned", {})
        found.append(
            {
                "identity": cache.identity(device),
                "tuned": table.get("when"),
                "rules": table.get("rules", []),
                "trials": trials.listed(device),
            }
        )
    return found


def _gpu_lines(facts: dict[str, Any]) -> list[str]:
    lines = ["", facts["identity"]]
    if facts["tuned"] is None:
        lines.append("  not tuned: `mghf-fast tune` measures which kernels are fastest here")
    else:
        lines.append(f"  tuned {facts['tuned']} ({cache.path()})")
        for rule in facts["rules"]:
            below = "" if rule["below"] is None else f" below {rule['below']:.4g}"
            least = f" from {rule['least']:.4g}" if rule["least"] else ""
            order = ", then ".join(rule["backends"])
            lines.append(f"    {rule['op']}, {', '.join(rule['dtypes'])}{least}{below}: {order}")
    for row in facts["trials"]:
        types = f" ({', '.join(row['types'])})" if row["types"] else ""
        lines.append(f"  on trial: {row['backend']} {row['op']}, {row['state']}{types}")
    return lines


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def examine() -> dict[str, Any]:
    """Everything the doctor reports, ready for JSON.

    Returns:
        ``machine``, ``packages`` (version or ``None``), ``backends`` (available or not, and why),
        ``instruction_set`` (see :func:`instruction_set`), ``ops`` (see :func:`op_backends`),
        ``build`` (facts of the compiled kernels, maybe empty), ``self_check`` (see
        :func:`self_check`), ``gpus`` (see :func:`gpus`) and ``usable``.
    """
    reasons = unavailable_reasons()
    checks = self_check()
    return {
        "machine": machine_facts(),
        "packages": {name: _version(name) for name in PACKAGES},
        "backends": {
            name: {"available": name in available_backends(), "reason": reasons.get(name)}
            for name in BACKENDS
        },
        "instruction_set": instruction_set(),
        "ops": op_backends(),
        "build": native.build_facts(),
        "self_check": checks,
        "gpus": gpus(),
        "usable": bool(checks) and all(check["passed"] for check in checks.values()),
    }


def report(facts: dict[str, Any]) -> str:
    """The facts of :func:`examine` as text for a terminal."""
    machine = facts["machine"]
    packages = ", ".join(f"{n} {v or 'missing'}" for n, v in facts["packages"].items())
    lines = [
        f"mghf_fast {machine['mghf_fast']}",
        f"  python {machine['python']}, {packages}",
        f"  {machine['os']}; {machine['cpu']}, {machine['isa']} in PyTorch, "
        f"{machine['cores']} cores, {machine['threads']} threads, {machine['memory_gib']} GiB",
        f"  GPU: {machine['gpu'] or 'none that torch can use'}",
        "",
        "Backends",
    ]
    for name, backend in facts["backends"].items():
        state = "available" if backend["available"] else backend["reason"]
        if name == "cpu" and facts["instruction_set"] is not None:
            state += f", with the instruction set {facts['instruction_set']}"
        lines.append(f"  {name:10} {state}")

    lines += ["", "Ops            " + "".join(f"{name:>11}" for name in facts["backends"])]
    for op, reasons in facts["ops"].items():
        marks = ("yes" if reason is None else "-" for reason in reasons.values())
        lines.append(f"  {op:13}" + "".join(f"{mark:>11}" for mark in marks))

    lines += ["", "Compiled kernels"]
    build = facts["build"] or {"none": "see the backend cpu"}
    for name, value in build.items():
        text = value if isinstance(value, str) else json.dumps(value)
        lines.append(f"  {name}: {text}")

    for gpu in facts["gpus"]:
        lines += _gpu_lines(gpu)

    lines += ["", f"Self-check (Sinkhorn plan against float64, tolerance {TOLERANCE:.0e})"]
    for name, check in facts["self_check"].items():
        result = f"error {check['error']:.1e}" if check["message"] is None else check["message"]
        lines.append(f"  {name:10} {'ok' if check['passed'] else 'FAILED'}, {result}")
    lines += ["", "Usable." if facts["usable"] else "NOT usable: see the self-check above."]
    return "\n".join(lines)
