"""Every upstream defect that is known has a test that names it."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

from tests.defects.upstream import SERVING, TRAINING

TESTS = Path(__file__).resolve().parents[1]


@functools.cache
def told_of() -> frozenset[str]:
    """Numbers in docstrings of test functions, and of the files that hold them."""
    found: set[str] = set()
    for path in TESTS.rglob("test_*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
        for node in (tree, *(f for f in functions if f.name.startswith("test_"))):
            found.update(re.findall(r"[\w./-]+#\d+", ast.get_docstring(node) or ""))
    return frozenset(found)


@pytest.mark.parametrize("table", [SERVING, TRAINING], ids=["serving", "training"])
def test_every_number_is_in_some_tests_docstring(table: dict[str, str]) -> None:
    assert [f"{number}: {what}" for number, what in table.items() if number not in told_of()] == []
