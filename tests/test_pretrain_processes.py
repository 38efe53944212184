"""Trainings that are killed, run out of disk, or share their batches between two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")


@pytest.fixture(scope="module")
def happened(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Scenario -> the results of pretrain_processes.py."""
    script = Path(__file__).with_name("pretrain_processes.py")
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    told = subprocess.run(
        [sys.executable, str(script), str(tmp_path_factory.mktemp("processes"))],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert told.returncode == 0, told.stderr
    return json.loads(told.stdout.splitlines()[-1])


def test_a_killed_training_ends_with_the_weights_of_an_undisturbed_one(
    happened: dict[str, Any],
) -> None:
    found = happened["kills"]
    assert found["codes"] == [-9] * 7 + [0]
    assert found["checkpoints"] == [False] * 3 + [True] * 4
    assert found["leftovers"] == 1 and found["leftovers at the end"] == 0
    assert set(found["at random"][:-1]) <= {-9} and found["at random"][-1] == 0
    assert found["chosen"] == found["whole"]
    assert found["anywhere"] == found["whole"]


def test_a_full_disk_leaves_the_last_checkpoint_whole(happened: dict[str, Any]) -> None:
    found = happened["full_disk"]
    assert found["code"] == 2
    assert (
        "checkpoint.pt cannot be written: File too large (the earlier one is whole)"
        in (found["told"])
    )
    assert found["unchanged"]
    assert found["files"] == ["checkpoint.pt", "extractor.json", "extractor.safetensors"]
    assert found["resumed"] == 0


def test_two_processes_train_one_network(happened: dict[str, Any]) -> None:
    found = happened["ranks"]
    assert found["together"]["codes"] == [0, 0]
    first, second = found["noted"]
    assert first["weights"] == second["weights"]
    assert first["images"] != second["images"]
    assert found["half"] == found["rest"] == [0, 0]
    assert found["parts digests"]["weights"] == found["whole digests"]["weights"]
    assert found["seeds"]["codes"] == [2, 2]
    for told in found["seeds"]["told"]:
        assert "rank 1 differs from rank 0: seed is 1, on rank 0 0" in told
    assert found["no data"]["codes"] == [2, 2]
    assert "rank 1: --data none" in found["no data"]["told"][0]
    assert found["odd"]["codes"] == [2, 2]
    assert "--batch is 5; it must be a multiple of the 2 processes" in found["odd"]["told"][0]
    # A single process may not resume a training of two.
    assert found["alone"] == 2


def test_two_processes_learn_distances(happened: dict[str, Any]) -> None:
    if not (found := happened["distances"]):
        pytest.skip("stlpips_pytorch is not installed, whose distances are learned")
    assert found["whole"] == found["rest"] == [0, 0]
    assert found["half"] == [130, 130]
    assert found["parts digests"] == found["whole digests"]
