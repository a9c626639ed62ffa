"""The make verbs and the files that come with a project, by their agreed names."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from scripts.make_docs import broken_links

ROOT = Path(__file__).resolve().parents[2]
VERBS = ("setup", "print-venv", "demo", "serve", "test", "test-all", "lint", "bench", "proto", "docs")
NEED_SETUP = ("demo", "serve", "test", "test-all", "lint", "bench", "proto", "docs")


@pytest.fixture(scope="module")
def makefile() -> str:
    return (ROOT / "Makefile").read_text(encoding="utf-8")


@pytest.mark.parametrize("verb", VERBS)
def test_verb_exists(makefile: str, verb: str) -> None:
    assert re.search(rf"^{verb}:", makefile, re.MULTILINE)


@pytest.mark.parametrize("verb", NEED_SETUP)
def test_verb_sets_up_first(makefile: str, verb: str) -> None:
    rule = re.search(rf"^{verb}:([^#\n]*)", makefile, re.MULTILINE)
    assert rule is not None and "setup" in rule[1].split()


def test_print_venv_says_where() -> None:
    said = subprocess.run(["make", "-s", "print-venv"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert Path(said.stdout.strip()) == ROOT / ".venv"


@pytest.mark.parametrize(
    "name", [".ci/run", "scripts/setup_venv.sh", "scripts/build_native.sh", "scripts/proto.sh"]
)
def test_scripts_stop_at_the_first_error(name: str) -> None:
    path = ROOT / name
    assert os.access(path, os.X_OK)
    assert "set -euo pipefail" in path.read_text(encoding="utf-8")


def test_the_version_is_said_once_and_the_same() -> None:
    import coserve

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == coserve.__version__
    assert f"## {coserve.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["README.md", "LICENSE", "CONTRIBUTING.md", "CHANGELOG.md", "Dockerfile"])
def test_file_is_there(name: str) -> None:
    assert (ROOT / name).stat().st_size > 100


def test_links_in_the_documents_lead_somewhere() -> None:
    assert broken_links() == []
