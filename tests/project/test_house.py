"""The rules of the house, read from the sources: imports point downwards, files stay short, work is done."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "coserve"
# A room may import rooms at its own depth or deeper, never one above it.
DEPTH = {
    "cli": 0,
    "dashboard": 0,
    "server": 1,
    "engine": 2,
    "training": 3,
    "worker": 3,
    "lora": 3,
    "models": 4,
    "layers": 5,
    "kernels": 6,
    "core": 7,
}
HARD_LINES = 600
GENERATED = re.compile(r"_pb2(_grpc)?\.pyi?$")
MADE_PAGES = ("cli.md", "api.md")  # by scripts/make_docs.py, as long as the code says
UNFINISHED = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X|NotImplemented" + r"Error)\b")


def tracked(*patterns: str) -> list[Path]:
    """Files of the working tree that git tracks or would track."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    found = [ROOT / line for line in listing.stdout.splitlines()]
    return [path for path in found if path.is_file() and not GENERATED.search(path.name)]


def package_files() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if not GENERATED.search(path.name)]


def imports_of(path: Path) -> list[tuple[int, str]]:
    """(line, absolute module) of every import of a file of the package, the ones inside functions too."""
    package = list(path.relative_to(ROOT).parts[:-1])
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join(base + ([node.module] if node.module else []))
            found += [(node.lineno, f"{stem}.{alias.name}") for alias in node.names]
    return found


def room_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "coserve" and len(parts) > 1 and parts[1] in DEPTH else None


def test_imports_point_downwards() -> None:
    upward = []
    for path in package_files():
        own = path.relative_to(PACKAGE).parts[0]
        for line, module in imports_of(path):
            other = room_of(module)
            if own in DEPTH and other and DEPTH[other] < DEPTH[own]:
                upward.append(f"{path.relative_to(ROOT)}:{line} {own} -> {other}")
    assert upward == []


def test_core_imports_only_itself_errors_and_config() -> None:
    allowed = ("coserve.core", "coserve.errors", "coserve.config")
    wrong = []
    for path in sorted((PACKAGE / "core").glob("*.py")):
        for line, module in imports_of(path):
            inside = module.split(".")[0] == "coserve"
            if (inside and not module.startswith(allowed)) or module.split(".")[0] in ("torch", "triton"):
                wrong.append(f"{path.name}:{line} {module}")
    assert wrong == []


@pytest.mark.parametrize("room", ["models", "layers", "kernels"])
def test_nothing_below_the_worker_knows_the_engine_or_core(room: str) -> None:
    known = {room_of(module) for path in (PACKAGE / room).glob("*.py") for _, module in imports_of(path)}
    assert known & {"cli", "server", "engine", "worker", "training", "lora"} == set()


def test_the_server_runs_without_torch() -> None:
    heavy = "{'torch', 'transformers'} & set(sys.modules)"
    program = f"import sys, coserve.server.main; sys.exit(bool({heavy}))"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


def test_no_file_is_over_the_hard_limit() -> None:
    counts = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in tracked("*.py", "*.cpp", "*.h", "*.proto", "*.sh", "*.md")
        if path.name not in MADE_PAGES
    }
    assert counts, "nothing was found to look at"
    assert {name: lines for name, lines in counts.items() if lines > HARD_LINES} == {}


def test_nothing_is_left_undone() -> None:
    left = [
        f"{path.relative_to(ROOT)}:{number} {line.strip()}"
        for path in tracked("*.py", "*.cpp", "*.h", "*.proto", "*.sh", "Makefile")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if UNFINISHED.search(line)
    ]
    assert left == []


def test_no_package_registry_is_named() -> None:
    hosts = re.compile(
        r"(pypi|pythonhosted|download\.pytorch|anaconda|npmjs|registry-1\.docker)\.\w+", re.IGNORECASE
    )
    named = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in tracked()
        if path.suffix not in (".safetensors", ".png")
        for match in [hosts.search(path.read_text(encoding="utf-8", errors="replace"))]
        if match and path != Path(__file__).resolve()
    ]
    assert named == []


def test_every_setting_is_used() -> None:
    """A flag that nobody reads would do nothing."""
    from coserve.config import EngineConfig, ServerConfig

    readers = "\n".join(
        path.read_text(encoding="utf-8")
        for path in package_files()
        if path.name != "config.py" and path.relative_to(PACKAGE).parts[0] != "cli"
    )
    settings = [*EngineConfig.__struct_fields__, *ServerConfig.__struct_fields__]
    unread = [name for name in settings if not re.search(rf"\.{name}\b", readers)]
    assert unread == []


def test_tests_assert_something() -> None:
    empty = []
    for path in tracked("tests/**/test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_test = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith(
                "test_"
            )
            if is_test and not asserts(node):
                empty.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert empty == []


def asserts(function: ast.AST) -> bool:
    """Whether there is an assert, or a call whose name says that it checks."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call) and re.search(
            r"raises|assert|check|expect", ast.unparse(node.func), re.I
        ):
            return True
    return False
