"""Replaces hypothesis if it is not installed: a test that draws its input is skipped."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from types import ModuleType
from typing import Any

import pytest


class Anything:
    """A strategy, and anything derived from it."""

    def __call__(self, *arguments: Any, **options: Any) -> Anything:
        return self

    def __getattr__(self, name: str) -> Anything:
        return self

    def __or__(self, other: Any) -> Anything:
        return self


def given(*strategies: Any, **named: Any) -> Callable[..., Any]:
    def decorate(test: Callable[..., Any]) -> Callable[..., Any]:
        @pytest.mark.skip(reason="hypothesis is not installed")
        def skipped() -> None: ...

        skipped.__name__ = test.__name__
        return skipped

    return decorate


def settings(*arguments: Any, **options: Any) -> Callable[..., Any]:
    return lambda test: test


def strategy(name: str) -> Anything:
    if name.startswith("__"):  # a module with every attribute would have a strange `__file__` too
        raise AttributeError(name)
    return Anything()


def install(modules: MutableMapping[str, Any]) -> None:
    """Registers the replacement for `import hypothesis`."""
    hypothesis = ModuleType("hypothesis")
    strategies: Any = ModuleType("hypothesis.strategies")
    strategies.__getattr__ = strategy
    contents = {"given": given, "settings": settings, "assume": bool, "example": settings}
    vars(hypothesis).update(contents, strategies=strategies)
    modules["hypothesis"], modules["hypothesis.strategies"] = hypothesis, strategies
