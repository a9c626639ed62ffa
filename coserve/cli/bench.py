"""`coserve bench NAME`: run one program of the checkout's bench/ folder with the given arguments."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

import coserve
from coserve.cli.failure import CommandFailed
from coserve.errors import ConfigError


def bench(
    name: Annotated[str, typer.Argument(help="A program of bench/, such as finetune.")],
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[--out FILE] [--quick] ...", help="Passed on to the bench.")
    ] = None,
) -> None:
    """Run a bench of the source checkout and write its figures as JSON."""
    root = Path(coserve.__file__).resolve().parent.parent
    folder = root / "bench"
    if not folder.is_dir():
        raise CommandFailed("bench: only a source checkout has the benches; run it in a clone.")
    known = sorted(
        path.stem for path in folder.glob("*.py") if not path.stem.startswith("_") and _is_program(path)
    )
    if name not in known:
        raise ConfigError(f"bench {name}: there are {', '.join(known)}.", param="name")
    run = subprocess.run([sys.executable, str(folder / f"{name}.py"), *(arguments or ())], cwd=root)
    raise typer.Exit(run.returncode)


def _is_program(path: Path) -> bool:
    return 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")
