"""Write requirements.lock: every package of the environment with its version and its file's hash.

    python scripts/lock.py              what is newest within pyproject.toml's ranges
    python scripts/lock.py --installed  the versions of the environment that runs this

The files are those for this platform and Python. torch isn't in it: which build is right depends on the
machine (scripts/setup_venv.sh pins its version), and what torch's build for a GPU brings follows from it.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import tempfile
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "requirements.lock"
LEFT_OUT = re.compile(r"coserve|torch|triton|nvidia-.*|cuda-.*|pip|cmake")


def normal(name: str) -> str:
    """A distribution's name as all tools compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def resolved(constraints: list[str]) -> dict[str, tuple[str, str]]:
    """Name -> (version, sha256) of all that an installation would take; pip decides."""
    with tempfile.TemporaryDirectory() as folder:
        limits, report = Path(folder, "constraints.txt"), Path(folder, "report.json")
        limits.write_text("\n".join(constraints))
        command = [
            *(sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"),
            *("--only-binary", ":all:", "--config-settings=wheel.cmake=false"),
            *("--constraint", str(limits), "--report", str(report), ".[test,demo,bench]"),
        ]
        subprocess.run(command, cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
        items = json.loads(report.read_text())["install"]
    found = {}
    for item in items:
        name = normal(item["metadata"]["name"])
        if not LEFT_OUT.fullmatch(name):
            hashes = item["download_info"]["archive_info"]["hashes"]
            found[name] = (item["metadata"]["version"], hashes["sha256"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--installed", action="store_true", help="keep the versions that are installed")
    keep = []
    if parser.parse_args().installed:
        own = {normal(dist.metadata["Name"]): dist.version for dist in distributions()}
        keep = [f"{name}=={version}" for name, version in own.items() if not LEFT_OUT.fullmatch(name)]
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    lines = [
        f"# Made by scripts/lock.py for {platform.system()} {platform.machine()}, Python {python}.",
        *(
            f"{name}=={version} --hash=sha256:{digest}"
            for name, (version, digest) in sorted(resolved(keep).items())
        ),
    ]
    LOCK.write_text("\n".join(lines) + "\n")
    print(f"{len(lines) - 1} packages in {LOCK.name}")


if __name__ == "__main__":
    main()
