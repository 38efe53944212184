"""`--outcomes FILE` writes each test's outcome line by line, so that it is known even if the
process is killed. `--share 2/5` selects a part of the tests, so that several processes share a
file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

MESSAGE = 300  # characters


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, help="file to which what became of each test goes")
    parser.addoption("--share", help="i/n: of n processes that share the tests this is the i-th")


def pytest_configure(config: pytest.Config) -> None:
    if (path := config.getoption("--outcomes")) is not None:
        config.pluginmanager.register(Outcomes(path))
    if (share := config.getoption("--share")) is not None:
        config.pluginmanager.register(Share(share))


class Share:
    """Selects every n-th test, so that the variants of a slow one are distributed."""

    def __init__(self, share: str) -> None:
        first, _, count = share.partition("/")
        if not (first.isdigit() and count.isdigit() and 1 <= int(first) <= int(count)):
            raise pytest.UsageError(f"--share must be i/n with 1 <= i <= n, got {share}")
        self._every = slice(int(first) - 1, None, int(count))

    @pytest.hookimpl(trylast=True)  # after -k
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = items[self._every]


def message(report: Any) -> str:
    """Where the test failed, and the beginning of the error."""
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is None:
        return " ".join(str(report.longrepr).split())[-MESSAGE:]
    text = f"{Path(crash.path).name}:{crash.lineno}: {crash.message}"
    return " ".join(text.split())[:MESSAGE]


class Outcomes:
    def __init__(self, path: Path) -> None:
        self._file = path.open("w", buffering=1)

    def _write(self, event: str, **facts: Any) -> None:
        self._file.write(json.dumps({"event": event} | facts) + "\n")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._write("error", test=report.nodeid, message=message(report))

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._write("selected", count=len(session.items))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write("begun", test=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            how = "failed" if report.when == "call" else "error"
            self._write(how, test=report.nodeid, message=message(report))
        elif report.when == "call" or report.skipped:
            self._write(report.outcome, test=report.nodeid)
