"""Write docs/cli.md and docs/api.md from the code, and check that every link in the documents is good."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import typer

from coserve.cli.main import app
from scripts import api_page

ROOT = Path(__file__).resolve().parent.parent
HEAD = "# The command line\n\nMade by `make docs` from the flags' own help; change that instead.\n"


def sections(command: Any, path: list[str], parent: Any = None) -> list[str]:
    """The help of a command and of the commands below it, as sections of the page."""
    context = command.make_context(path[-1], [], parent=parent, resilient_parsing=True)
    context.terminal_width = 100
    text = re.sub(r"[ \t]+\n", "\n", command.get_help(context)).strip()
    found = [f"\n## {' '.join(path)}\n\n```\n{text}\n```\n"]
    for name, child in getattr(command, "commands", {}).items():
        found += sections(child, [*path, name], context)
    return found


def pages() -> dict[str, str]:
    """The pages that are made, by name."""
    command_line = HEAD + "".join(sections(typer.main.get_command(app), ["coserve"]))
    return {"cli.md": command_line, "api.md": api_page.page()}


def broken_links() -> list[str]:
    """`page -> target` of every link to a file that isn't there."""
    broken = []
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.relative_to(ROOT)} -> {target}")
    return broken


def main() -> int:
    """Returns 1 when a link is broken."""
    for name, text in pages().items():
        page = ROOT / "docs" / name
        if not page.exists() or page.read_text(encoding="utf-8") != text:
            page.write_text(text, encoding="utf-8")
    broken = broken_links()
    print("\n".join(f"broken link: {line}" for line in broken) or "docs: every link leads somewhere")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
