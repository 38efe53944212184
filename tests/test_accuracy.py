"""The table of errors by precision, in docs/benchmarks.md."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import accuracy
from mghf_fast.precision import PRECISIONS

ALLOWED = {"float32": (1e-5, 1e-4), "tf32": (2e-3, 2e-2), "bfloat16": (2e-2, 1e-1)}


def test_the_page_has_the_errors_that_were_measured() -> None:
    errors = json.loads(accuracy.ERRORS.read_text())
    page = accuracy.PAGE.read_text()
    assert page == accuracy.replaced(page, errors)
    for found in errors.values():
        of_ops = found["errors"]
        assert found["machine"] and found["torch"] and of_ops.keys() == accuracy.SIZES.keys()
        for of_precisions in of_ops.values():
            assert of_precisions.keys() == {*PRECISIONS}
            for precision, (of_result, of_gradient) in of_precisions.items():
                assert of_result <= ALLOWED[precision][0], (precision, of_precisions)
                assert of_gradient <= ALLOWED[precision][1], (precision, of_precisions)


@pytest.mark.parametrize("op", accuracy.SIZES)
def test_errors_are_of_the_result_and_its_gradient(op: str) -> None:
    found = accuracy.errors_of(op, "reference", torch.device("cpu"))
    assert found.keys() == {*PRECISIONS}
    assert found["float32"] == found["tf32"] == found["bfloat16"]  # the reference ignores it
    for of_result, of_gradient in found.values():
        assert 0 < of_result <= 1e-5 and 0 < of_gradient <= 1e-4
