"""The launches of a step are recorded with the parameters that their kernels are given."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import emulated

pytestmark = emulated.needs_modules

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = """
import json, sys
from pathlib import Path
from benchmarks import launches, recording
module = launches.host_module(Path(sys.argv[1]))
recorder = recording.Recorder(module)
shape = (1, 3, 64, 64)
found = recorder.step("n", shape, "paper")
counts = launches.count("n", shape, "paper", "cuda", module)
names = [f.name for f in recorder.step("c", (1, 3, 128, 128), "paper")]
print(json.dumps([
    [[f.name, f.blocks, f.blocks_of_cluster, f.threads, f.shared_bytes, len(f.parameters),
      int.from_bytes(f.parameters[:8], "little")] for f in found],
    sum(counts.kernels.values()),
    names,
]))
"""  # in a separate process, because it can launch nothing afterwards


def test_cuda_launches_of_a_step_are_recorded() -> None:
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(emulated.FOLDER)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found, launches, of_patches = json.loads(done.stdout)
    assert len(found) == launches > 0
    for name, blocks, cluster, threads, shared, parameters, _ in found:
        assert name.startswith("_ZN4mghf4cuda")
        assert blocks > 0 and cluster > 0 and threads % 32 == 0 and shared >= 0
        assert parameters > 0, name
    mixed = [first for name, *_, first in found if "4cuda12_GLOBAL__N_18mix_rows" in name]
    assert mixed and min(mixed) > 1 << 32  # the image's address
    # Images lie as on a GPU, where the kernels that copy pieces of an image's rows take them.
    projections = [name for name in of_patches if "project" in name]
    assert projections and all("project_rows" in name for name in projections)
