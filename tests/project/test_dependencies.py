"""Nothing that isn't locked is installed, and the lock is what pyproject.toml asks for."""

from __future__ import annotations

import re
import sys
import tomllib
from importlib.metadata import Distribution, distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
LINE = re.compile(r"([a-z0-9]+(?:-[a-z0-9]+)*)==([0-9][0-9a-z.]*) --hash=sha256:([0-9a-f]{64})")
# The machine decides torch's build (scripts/setup_venv.sh pins the version), torch what its build brings.
BY_TORCH = re.compile(r"torch|triton|nvidia-.*|cuda-.*|cufile.*")
TOOLS = {"coserve", "pip", "setuptools", "wheel", "cmake"}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def locked() -> dict[str, str]:
    """Name -> version; every line has to have the one form."""
    found = {}
    for line in (ROOT / "requirements.lock").read_text().splitlines()[1:]:
        match = LINE.fullmatch(line)
        assert match, f"no version with its hash: {line[:80]}"
        assert match[1] not in found
        found[match[1]] = match[2]
    return found


def asked() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    return [Requirement(text) for group in lists for text in group]


def installed() -> dict[str, Distribution]:
    """What this environment has, without what lies in its users' own paths."""
    found = {normal(dist.metadata["Name"]): dist for dist in distributions(path=[path_of_packages()])}
    assert "pytest" in found
    return found


def path_of_packages() -> str:
    return next(path for path in sys.path if path.startswith(sys.prefix) and path.endswith("site-packages"))


def needs_lock() -> None:
    marker = Path(sys.prefix) / ".unlocked"
    if marker.exists():
        pytest.skip(f"this environment is not the locked one: {marker.read_text().strip()}")


def test_the_lock_holds_what_the_project_asks_for() -> None:
    versions = locked()
    assert list(versions) == sorted(versions) and len(versions) > 50
    for requirement in asked():
        name = normal(requirement.name)
        if name in TOOLS or BY_TORCH.fullmatch(name):
            continue
        assert versions[name] in requirement.specifier, (
            f"{requirement} and {versions[name]}: run scripts/lock.py"
        )


def test_nothing_else_is_installed() -> None:
    """Versions are those of the lock; their files were checked against its hashes when they came."""
    needs_lock()
    versions = locked()
    found = {n: d.version for n, d in installed().items() if n not in TOOLS and not BY_TORCH.fullmatch(n)}
    assert {name: version for name, version in found.items() if versions.get(name) != version} == {}


def test_what_the_locked_packages_need_is_locked() -> None:
    """So an installation of the lock pulls nothing in behind its back."""
    needs_lock()
    versions, missing = locked(), set()
    for name, dist in installed().items():
        if name not in versions:
            continue
        for text in dist.requires or ():
            requirement = Requirement(text)
            other = normal(requirement.name)
            wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if wanted and other not in versions and other not in TOOLS and not BY_TORCH.fullmatch(other):
                missing.add(f"{name} -> {other}")
    assert missing == set()


def test_no_host_is_named_where_packages_come_from() -> None:
    names = [
        "requirements.lock",
        "pyproject.toml",
        "scripts/lock.py",
        "scripts/audit.sh",
        "scripts/setup_venv.sh",
    ]
    for name in names:
        text = (ROOT / name).read_text()
        assert not re.search(r"https?://|file://|--index-url +[a-z]|--find-links", text), name
