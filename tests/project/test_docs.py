"""Pages that are made from the code say what the code says now."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import api_page
from scripts.make_docs import pages

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.mark.parametrize("name", ["api.md", "cli.md"])
def test_made_pages_are_current(name: str) -> None:
    made = (DOCS / name).read_text(encoding="utf-8")
    assert made == pages()[name], f"docs/{name} is behind the code: run `make docs`"


def test_every_route_and_method_says_what_it_does() -> None:
    tables = "".join((*api_page.http_routes(), *api_page.rpcs()))
    silent = [line for line in tables.splitlines() if line.startswith("| `") and "|  |" in line]
    assert not silent
