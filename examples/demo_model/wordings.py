"""Reader of the two text resources: question wordings and word lists."""

from __future__ import annotations

from functools import cache
from pathlib import Path


def read_sections(path: Path) -> dict[str, tuple[str, ...]]:
    """Lines of every ``[section]`` of a text file, without blank lines and ``#`` comments."""
    sections: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("[") and line.endswith("]"):
            lines = sections.setdefault(line[1:-1], [])
        elif line and not line.startswith("#"):
            lines.append(line)
    return {name: tuple(found) for name, found in sections.items()}


@cache
def _all_wordings() -> dict[str, tuple[str, ...]]:
    return read_sections(Path(__file__).with_name("wordings.txt"))


def wordings(name: str) -> tuple[str, ...]:
    """The wordings of section ``name`` of ``wordings.txt``, in file order."""
    return _all_wordings()[name]
