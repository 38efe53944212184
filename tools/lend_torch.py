"""Lends this environment's torch to another of the same Python: `python lend_torch.py FOLDER`.

The other environment gets links to torch and its requirements, so that pip considers them
installed; other requirements of a package must be installed there.
"""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path


def with_requirements(name: str) -> dict[str, Distribution]:
    """A distribution and whatever it requires, directly or not, as far as it is installed."""
    found: dict[str, Distribution] = {}
    waiting = [name]
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        if name in found:
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            continue  # required on other systems, or by an extra
        for text in found[name].requires or []:
            if "extra ==" not in text and (required := re.match(r"[\w.-]+", text)):
                waiting.append(required[0])
    return found


def main(folder: Path) -> None:
    python = folder / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    run = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    packages = Path(run.stdout.strip())
    for one in with_requirements("torch").values():
        for top in {path.parts[0] for path in one.files or []} - {"..", "__pycache__"}:
            if not (link := packages / top).exists():
                link.symlink_to(str(one.locate_file(top)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
