"""Imports go one way: no cycles, and the library imports nothing from the command line."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import mghf_fast
from mghf_fast.commands import choices, cli
from mghf_fast.losses import mghf, settings
from mghf_fast.nn import detail_feature_extractor, start, stems
from mghf_fast.ops import vocabulary

ROOT = Path(__file__).parent.parent
PACKAGE = Path(mghf_fast.__file__).parent
COMMANDS = "mghf_fast.commands"
NEVER_AT_ONCE = ("torch", "numpy", COMMANDS, "mghf_fast.integrations")


def modules(package: Path) -> dict[str, Path]:
    """Name -> file of every module of a package, including the package itself."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def is_type_checking(node: ast.AST) -> bool:
    """Whether a part of a module is for type checkers only and never runs."""
    match node:
        case ast.If(test=ast.Name(id="TYPE_CHECKING") | ast.Attribute(attr="TYPE_CHECKING")):
            return True
    return False


def statements(node: ast.AST, types_too: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports in a part of a module, those inside functions too."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif types_too or not is_type_checking(child):
            yield from statements(child, types_too)


def imported(name: str, path: Path, known: Mapping[str, Path], types_too: bool) -> set[str]:
    """The modules among ``known`` that a module imports; importing a name from a package counts as
    the package, importing a submodule as the submodule."""
    found = set()
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for statement in statements(ast.parse(path.read_text()), types_too):
        if isinstance(statement, ast.Import):
            found |= {alias.name for alias in statement.names}
            continue
        above = package[: len(package) - statement.level + 1] if statement.level else []
        base = ".".join([*above, *filter(None, [statement.module])])
        for alias in statement.names:
            inner = f"{base}.{alias.name}"
            found.add(inner if inner in known else base)
    return (found & known.keys()) - {name}


def graph(known: Mapping[str, Path], types_too: bool = False) -> dict[str, set[str]]:
    return {name: imported(name, path, known, types_too) for name, path in known.items()}


def circle(arrows: Mapping[str, set[str]]) -> list[str]:
    """A cycle of modules that import each other, with the first one again at the end; or empty."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for other in sorted(arrows[name]):
            if found := visit(other, [*path, name]):
                return found
        done.add(name)
        return []

    return next(filter(None, (visit(name, []) for name in sorted(arrows))), [])


@pytest.fixture(scope="module")
def known() -> dict[str, Path]:
    found = modules(PACKAGE)
    if not any(name.startswith("mghf_fast.kernels") for name in found):
        kernels = modules(ROOT / "kernels")  # beside the package until it is installed
        found |= {f"mghf_fast.{name}": path for name, path in kernels.items()}
    return found


def test_no_module_imports_in_a_circle(known: dict[str, Path]) -> None:
    assert circle(graph(known)) == []


def test_the_library_imports_nothing_of_the_commands(known: dict[str, Path]) -> None:
    wrong = {
        name: sorted(theirs)
        for name, others in graph(known, types_too=True).items()
        if not name.startswith(COMMANDS) and name != "mghf_fast.__main__"
        if (theirs := {other for other in others if other.startswith(COMMANDS)})
    }
    assert wrong == {}


def test_the_commands_use_no_private_attribute_of_a_loss(known: dict[str, Path]) -> None:
    wrong = [
        f"{path.name}, line {node.lineno}: {node.value.id}.{node.attr}"
        for name, path in known.items()
        if name.startswith(COMMANDS)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        if node.attr.startswith("_") and node.value.id in ("loss", "extractor", "projection")
    ]
    assert wrong == []


def test_a_circle_and_a_hidden_arrow_are_found(tmp_path: Path) -> None:
    package = tmp_path / "p"
    (package / "q").mkdir(parents=True)
    (package / "__init__.py").write_text("from .a import x\n")
    (package / "a.py").write_text("def f():\n    from .q import b\nx = 1\n")
    (package / "q" / "__init__.py").write_text("")
    (package / "q" / "b.py").write_text("from .. import a\nfrom . import y\nimport p.c\n")
    (package / "c.py").write_text("if TYPE_CHECKING:\n    from p.q.b import z\n")
    found = modules(package)
    assert graph(found) == {
        "p": {"p.a"}, "p.a": {"p.q.b"}, "p.q": set(), "p.q.b": {"p.a", "p.q", "p.c"}, "p.c": set(),
    }  # fmt: skip
    assert circle(graph(found)) == ["p.a", "p.q.b", "p.a"]
    assert graph(found, types_too=True)["p.c"] == {"p.q.b"}


def loaded(code: str) -> list[str]:
    """The modules of NEVER_AT_ONCE that a new Python process has loaded after ``code``."""
    look = f"[n for n in {NEVER_AT_ONCE} if n in sys.modules]"
    run = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\nprint(*{look})"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return run.stdout.splitlines()[-1].split()


def test_importing_the_library_loads_no_command() -> None:
    assert loaded("import mghf_fast") == []
    assert loaded("from mghf_fast import MGHFLoss, functional") == ["torch", "numpy"]


def test_every_public_name_is_there_at_its_first_use() -> None:
    loaded("import mghf_fast\nfor name in mghf_fast.__all__: getattr(mghf_fast, name)")
    loaded("from mghf_fast import *\nMGHFLoss, functional, use_backend")
    with pytest.raises(AttributeError, match="module 'mghf_fast' has no attribute 'mghf'"):
        mghf_fast.mghf  # noqa: B018
    assert {*mghf_fast.__all__} <= {*dir(mghf_fast)}
    assert not {"Any", "annotations", "importlib"} & {*dir(mghf_fast)}  # what the module imports


def test_the_ops_alone_register_the_operators() -> None:
    """Needed by a program that only loads an exported graph."""
    assert "torch" in loaded("import mghf_fast.ops, torch\ntorch.ops.mghf_fast.gram")


@pytest.mark.parametrize(
    "words",
    [["--help"], ["--version"], []] + [[command, "--help"] for command in cli.COMMANDS],
    ids=" ".join,
)
def test_help_waits_for_no_torch(words: list[str]) -> None:
    code = f"""
from mghf_fast.commands.cli import main
try:
    main({words})
except SystemExit:
    pass"""
    assert "torch" not in loaded(code)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("VARIANTS", mghf.VARIANTS),
        ("PRESETS", tuple(settings.PRESETS)),
        ("DEFAULT_PRESET", settings.DEFAULT_PRESET),
        ("DEFAULT_EXTRACTOR", settings.DEFAULT_EXTRACTOR),
        ("STEMS", stems.STEMS),
        ("SQUEEZES", detail_feature_extractor.SQUEEZES),
        ("SUBNETS", vocabulary.SUBNETS),
        ("ACTIVATIONS", vocabulary.ACTIVATIONS),
        ("STARTS", start.STARTS),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_choices_are_the_library_s(name: str, theirs: object) -> None:
    assert getattr(choices, name) == theirs


def test_no_choice_is_left_out() -> None:
    (mark,) = (m for m in test_choices_are_the_library_s.pytestmark if m.name == "parametrize")
    assert {name for name, _ in mark.args[1]} == {n for n in vars(choices) if n.isupper()}
