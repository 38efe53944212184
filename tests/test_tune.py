"""`mghf-fast tune`: times of kernels, rules from them, and the user's cache."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mghf_fast import cache, preferences, trials
from mghf_fast.backends import BACKENDS
from mghf_fast.commands.cli import main
from mghf_fast.commands.doctor import examination as doctor
from mghf_fast.commands.tune import measurement as tune
from mghf_fast.ops import OPS

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))

    def forget() -> None:
        for function in (cache._known, cache._told, preferences.tuned):
            function.cache_clear()

    forget()
    yield tmp_path / "cache" / cache.NAME
    forget()


def rows(op: str, dtype: str, times: dict[int, tuple[float | None, float | None]]) -> list[Any]:
    found = []
    for size, each in times.items():
        for backend, seconds in zip(("cuda", "triton"), each, strict=True):
            row: dict[str, Any] = {"op": op, "dtype": dtype, "backend": backend, "size": size}
            row |= {"failure": "x"} if seconds is None else {"seconds": seconds}
            found.append(row)
    return found


def test_rules_follow_the_times() -> None:
    found = tune.rules(
        rows("gram", "float32", {100: (1.0, 2.0), 400: (1.0, 1.5), 1600: (3.0, 2.0)})
    )
    assert [(r["backends"], r["least"], r["below"]) for r in found] == [
        (["cuda", "triton"], 0.0, 800.0),
        (["triton", "cuda"], 800.0, None),
    ]
    # The committed table decides ties; failed kernels are not preferred, and unmeasured ones get no
    # rule.
    (draw,) = tune.rules(rows("gram", "float32", {100: (1.04, 1.0)}))
    assert draw["backends"] == ["cuda", "triton"]
    (failed,) = tune.rules(rows("gram", "float32", {100: (None, 1.0)}))
    assert failed["backends"] == ["triton"]
    assert tune.rules(rows("gram", "float32", {100: (None, None)})) == []
    both = tune.rules(
        rows("gram", "float32", {100: (1.0, 2.0)}) + rows("gram", "bfloat16", {100: (2.0, 1.0)})
    )
    assert [(r["dtypes"], r["backends"][0]) for r in both] == [
        (["float32"], "cuda"),
        (["bfloat16"], "triton"),
    ]


def test_auto_follows_the_users_table(monkeypatch: pytest.MonkeyPatch, empty_cache: Path) -> None:
    found = tune.rules(rows("gram", "float32", {100: (2.0, 1.0), 10_000: (1.0, 2.0)}))
    cache.write(CPU, "tuned", {"when": "a day", "rows": [], "rules": found})
    assert preferences.tuned(CPU) == ()  # of GPUs only
    monkeypatch.setattr(cache, "identity", lambda device: cache_identity)
    cache_identity = next(iter(json.loads(empty_cache.read_text())["machines"]))
    gpu = torch.device("cuda", 0)
    table = preferences.tuned(gpu)
    assert [rule.backends for rule in table] == [("triton", "cuda"), ("cuda", "triton")]
    order = preferences.preferred_kernels(
        "gram", torch.float32, (1, 64), (*table, *preferences.RULES)
    )
    assert order == ("triton", "cuda")
    other = preferences.preferred_kernels("gram", torch.bfloat16, (1, 64), table)
    assert other == preferences.DEFAULT  # not measured
    assert sorted(preferences.in_order("gram", [torch.zeros(1, 64)], BACKENDS)) == sorted(BACKENDS)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"format": 0, "machines": {}}',
        '{"format": 1, "machines": []}',
        '{"format": 1, "machines": {"a": 3}}',
        "\x00\xff",
    ],
)
def test_a_broken_file_is_told_once_and_left_out(empty_cache: Path, content: str) -> None:
    empty_cache.parent.mkdir()
    empty_cache.write_bytes(content.encode("latin-1"))
    with pytest.warns(RuntimeWarning, match="cannot be used") as caught:
        assert cache.known(CPU) == {} and cache.known(CPU) == {}
        assert cache.read() == {}
    assert len(caught) == 1 and str(empty_cache) in str(caught[0].message)
    cache.write(CPU, "tuned", {"when": "later"})  # `tune` replaces it
    assert cache.known(CPU) == {"tuned": {"when": "later"}}


@pytest.mark.parametrize("rules", [3, [{}], [{"op": "gram", "dtypes": ["float31"]}], None])
def test_rules_that_make_no_sense_are_none(monkeypatch: pytest.MonkeyPatch, rules: Any) -> None:
    monkeypatch.setattr(cache, "known", lambda device: {"tuned": {"rules": rules}})
    assert preferences.tuned(torch.device("cuda", 0)) == ()


def test_a_table_of_another_version_is_not_read(
    monkeypatch: pytest.MonkeyPatch, empty_cache: Path
) -> None:
    cache.write(CPU, "tuned", {"when": "now", "rules": []})
    cache.identity.cache_clear()
    monkeypatch.setattr("mghf_fast._version.__version__", "99.0")
    assert cache.known(CPU) == {}
    cache.write(CPU, "tuned", {"when": "later", "rules": []})
    cache.identity.cache_clear()
    monkeypatch.undo()
    machines = json.loads(empty_cache.read_text())["machines"]
    assert sorted(m["tuned"]["when"] for m in machines.values()) == ["later", "now"]
    assert any("99.0" in name for name in machines)


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["tune"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "tune measures the kernels on an NVIDIA GPU" in told


@pytest.fixture
def two_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's kernels and the reference stand in for a GPU's two."""
    if OPS["gram"].why_not("cpu") is not None:
        pytest.skip(str(OPS["gram"].why_not("cpu")))
    monkeypatch.setattr(tune, "_gpu", lambda: CPU)
    monkeypatch.setattr(tune, "KERNELS", ("cpu", "reference"))
    monkeypatch.setattr(tune, "candidates", lambda op: ["cpu", "reference"])
    monkeypatch.setattr(preferences, "DEFAULT", ("cpu", "reference"))
    monkeypatch.setattr(preferences, "RULES", ())
    monkeypatch.setattr(tune, "SIZES", {"gram": ((1, 8), (1, 16)), "monce": ((2, 9),)})
    monkeypatch.setattr(tune, "BUDGET", 0.0)


def test_it_measures_and_writes(
    two_kernels: None, empty_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tune"]) == 0
    shown = capsys.readouterr().out
    assert f"Written: {empty_cache}" in shown and " ms" in shown and "monce" in shown
    found = cache.known(CPU)["tuned"]
    assert len(found["rows"]) == 12 and all(row["seconds"] > 0 for row in found["rows"])
    assert {r["op"] for r in found["rules"]} == {"gram", "monce"}
    facts = {"identity": "Some GPU", "tuned": found["when"], "rules": found["rules"], "trials": []}
    text = "\n".join(doctor._gpu_lines(facts))
    assert f"tuned {found['when']}" in text and "gram, float32" in text

    assert main(["tune", "--clear"]) == 0
    assert f"Deleted: {empty_cache}" in capsys.readouterr().out and not empty_cache.exists()
    assert main(["tune", "--clear"]) == 0
    assert "There was nothing" in capsys.readouterr().out


@pytest.mark.parametrize("faster", ["cpu", "reference"])
def test_the_op_runs_on_what_was_faster(
    two_kernels: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    faster: str,
) -> None:
    """The command, its file and the choices of later calls; after clearing they are as before."""
    x = torch.zeros(1, 128, 12, 12)
    assert OPS["gram"].preferred(x) == "cpu"
    backends = iter([backend for *_, backend in tune.works()])

    def seconds(call: Any, device: torch.device) -> float:
        return 1.0 if next(backends) == faster else 2.0

    monkeypatch.setattr(preferences, "DEVICES", ("cpu",))
    monkeypatch.setattr(tune, "seconds", seconds)
    assert main(["tune"]) == 0
    assert OPS["gram"].preferred(x) == faster
    assert main(["tune", "--clear"]) == 0
    assert OPS["gram"].preferred(x) == "cpu"


def test_what_fails_is_told_and_the_rest_measured(
    two_kernels: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refusal(op: str, backend: str, tensor: torch.Tensor) -> str | None:
        return "it failed its trial" if (op, backend) == ("gram", "cpu") else None

    monkeypatch.setattr(trials, "refusal", refusal)
    assert main(["tune"]) == 0
    assert "failed" in capsys.readouterr().out
    found = cache.known(CPU)["tuned"]["rules"]
    assert all(r["backends"] == ["reference"] for r in found if r["op"] == "gram")


def test_an_unwritable_cache_is_one_sentence(
    two_kernels: None, empty_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty_cache.parent.write_text("a file where the folder should be")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main(["tune"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "cannot be written" in told and cache.VARIABLE in told


def test_nothing_to_choose_between(
    two_kernels: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tune, "candidates", lambda op: ["cpu"])
    assert main(["tune"]) == 0
    assert "nothing to choose between" in capsys.readouterr().out


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache.folder() == tmp_path / "cache"
    monkeypatch.delenv(cache.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    if os.name == "posix" and os.uname().sysname != "Darwin":
        assert cache.folder() == tmp_path / "xdg" / "mghf_fast"
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert cache.folder() == Path.home() / ".cache" / "mghf_fast"
