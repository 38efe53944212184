"""The command line: exit codes, one-line errors, and imports only when they are needed."""

from __future__ import annotations

import argparse
import sys
import types

import draws
import pytest
import torch

from mghf_fast.commands import cli


def _command(monkeypatch: pytest.MonkeyPatch, run: object) -> None:
    """Makes ``mghf-fast demo`` call ``run``."""
    module = types.ModuleType("fake_command")
    module.add_arguments = lambda parser: parser.add_argument("--steps", type=int)  # type: ignore[attr-defined]
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fake_command", module)
    monkeypatch.setitem(cli.COMMANDS, "demo", ("fake_command", "a demo"))


def test_a_forced_backend_that_cannot_run_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(_: argparse.Namespace) -> int:
        from mghf_fast import functional, use_backend

        with use_backend("cuda"):
            functional.gram_matrix(draws.rand(1, 1, 4, 4, dtype=torch.float64))
        return 0

    def fail(_: argparse.Namespace) -> int:
        raise RuntimeError("a bug")

    _command(monkeypatch, run)
    assert cli.main(["demo"]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("mghf-fast: backend 'cuda' cannot run gram: ")
    assert errors.count("\n") == 1
    _command(monkeypatch, fail)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["demo"])


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in cli.COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("mghf_fast ")


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "doctor" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["tabel5"], "'tabel5'"),
        (["table5", "--size", "many"], "'many'"),
        (["table5", "--rows", "lop"], "'lop'"),
        (["doctor", "--colour"], "--colour"),
    ],
)
def test_bad_words_are_told_in_one_line(
    words: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    errors = capsys.readouterr().err
    assert end.value.code == 2
    assert named in errors and errors.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["table5", "--size", "31"], "--size is 31"),
        (["table5", "--rounds", "0"], "--rounds is 0"),
        (["table5", "--threads", "-1"], "--threads is -1"),
        (["table5", "--limit", "0"], "--limit is 0"),
        (["table5", "--json", "/no/such/folder/x.json"], "/no/such/folder/x.json"),
    ],
)
def test_bad_values_are_told_in_one_line(
    words: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 2
    errors = capsys.readouterr().err
    assert named in errors and errors.count("\n") == 1


def test_a_command_gets_its_options_and_gives_the_exit_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(arguments: argparse.Namespace) -> int:
        return int(arguments.steps)

    _command(monkeypatch, run)
    assert cli.main(["demo", "--steps", "7"]) == 7


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (ValueError("steps is 0;\nit must be at least 1"), 2, "mghf-fast: steps is 0; it must be"),
        (FileNotFoundError(2, "No such file", "pictures"), 2, "pictures"),
        (ModuleNotFoundError("No module named 'skimage'", name="skimage.io"), 2, "'skimage'"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_errors_of_a_command(
    error: BaseException,
    code: int,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(arguments: argparse.Namespace) -> int:
        raise error

    _command(monkeypatch, run)
    assert cli.main(["demo"]) == code
    errors = capsys.readouterr().err
    assert told in errors and errors.count("\n") == (1 if told else 0)


def test_a_missing_optional_package_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(arguments: argparse.Namespace) -> int:
        raise ModuleNotFoundError("No module named 'PIL'", name="PIL")

    _command(monkeypatch, run)
    assert cli.main(["demo"]) == 2
    assert 'pip install "mghf_fast[demo]"' in capsys.readouterr().err


def test_a_fault_of_ours_is_not_dressed_up_as_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(arguments: argparse.Namespace) -> int:
        raise RuntimeError("bug")

    _command(monkeypatch, run)
    with pytest.raises(RuntimeError, match="bug"):
        cli.main(["demo"])
