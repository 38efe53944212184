"""The command `mghf-fast` and its sub-commands.

A sub-command is a module with ``add_arguments(parser)`` and ``run(arguments) -> exit code``. Only
the requested one is imported, so that ``--help`` is fast.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from .. import __version__

COMMANDS = {
    "demo": (
        "mghf_fast.commands.demo.command",
        "fine-tune a small SR network with MGHF-c and with L1 on photographs, and compare",
    ),
    "evaluate": (
        "mghf_fast.commands.evaluate.command",
        "PSNR, SSIM, ST-LPIPS and NIQE of super-resolved pictures against their ground truths",
    ),
    "visualize": (
        "mghf_fast.commands.visualize.command",
        "feature maps, entropies and weights of a picture; of two, where the loss comes from",
    ),
    "calibrate": (
        "mghf_fast.commands.calibrate.command",
        "the loss's weight beside a pixel loss, from gradients in a network's parameters",
    ),
    "table5": (
        "mghf_fast.commands.table5.command",
        "the paper's Table 5: counts by formula, time and memory measured on this machine",
    ),
    "pretrain": (
        "mghf_fast.commands.pretrain.command",
        "train a detail feature extractor on your pictures or on built-in procedural ones",
    ),
    "tune": (
        "mghf_fast.commands.tune.command",
        "measure the kernels on this machine's GPU, so that each op takes the fastest there",
    ),
    "doctor": (
        "mghf_fast.commands.doctor.command",
        "versions, backends and why one is missing, build facts, a numerical self-check",
    ),
}
INSTALL = {
    name: f'pip install "mghf_fast[{name}]"'
    for name in ("demo", "evaluate", "pretrain", "visualize")
}
INSTALL["calibrate"] = INSTALL["evaluate"]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # One line; argparse would print the usage above it.
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parser(command: str | None) -> argparse.ArgumentParser:
    """The parser, with the options of ``command`` alone filled in."""
    parser = _Parser(
        prog="mghf-fast",
        description="Perceptual losses for super-resolution from invertible high-frequency "
        "features (MGHF).",
        epilog="`mghf-fast COMMAND --help` lists a command's options.",
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, (module, text) in COMMANDS.items():
        child = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name == command:
            loaded = importlib.import_module(module)
            loaded.add_arguments(child)
            child.set_defaults(run=loaded.run)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: the words after ``mghf-fast``; ``None`` takes them from ``sys.argv``.

    Returns:
        The exit code: the command's own, 2 for a user's mistake (reported in one line on stderr),
        130 when interrupted.
    """
    _ready_streams()
    words = list(sys.argv[1:] if arguments is None else arguments)
    command = next((word for word in words if not word.startswith("-")), None)
    try:
        parser = _parser(command)
        parsed = parser.parse_args(words)
        if parsed.version:
            print(f"mghf_fast {__version__}")
            return 0
        if parsed.command is None:
            parser.print_help()
            return 2
        code: int = parsed.run(parsed)
        sys.stdout.flush()
        return code
    except ModuleNotFoundError as error:
        missing = (error.name or str(error)).partition(".")[0]
        if missing == "mghf_fast":
            raise  # a bug of ours, not a missing dependency
        install = INSTALL.get(command or "", "pip install mghf_fast")
        return _fail(f"{command or 'this'} needs the package {missing!r}: {install}")
    except BrokenPipeError:
        # The reader (`| head`) has closed the pipe; Python must not report it again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        return _fail(str(error))
    except RuntimeError as error:
        from ..backends import BackendError  # not before, as it imports PyTorch

        if not isinstance(error, BackendError):
            raise
        return _fail(str(error))  # MGHF_BACKEND names one
    except KeyboardInterrupt:
        return 130


def _ready_streams() -> None:
    """Keeps printing from failing: characters that the terminal's encoding lacks are escaped, and
    output to a closed stream (None) is discarded."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def _fail(message: str) -> int:
    sys.stderr.write("mghf-fast: " + " ".join(message.split()) + "\n")
    return 2
