"""`coserve adapters merge`: several PEFT directories made into one, without a server."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from coserve.cli.values import existing_dir
from coserve.errors import ConfigError, CoserveError


def merge(
    directory: Annotated[str, typer.Argument(metavar="OUT", help="Folder to make; must not exist yet.")],
    adapters: Annotated[
        list[str],
        typer.Argument(metavar="DIR[=WEIGHT]...", help="PEFT directories, each with its weight [1]."),
    ],
    method: Annotated[
        str, typer.Option(metavar="linear|svd|ties", help="The sum, the sum cut to a rank, or TIES.")
    ] = "svd",
    rank: Annotated[int, typer.Option(min=0, help="Of svd and ties; 0 is the largest of the adapters'.")] = 0,
    density: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Of ties: share of each adapter's entries that is kept.")
    ] = 0.5,
) -> None:
    """Merge adapters of one base model into a new one. linear is exact and adds the ranks up."""
    folder = Path(directory).expanduser()
    if folder.exists():
        raise ConfigError(f"OUT {directory}: exists already; name a new one.", param="directory")
    given = [_source(word) for word in adapters]
    if len(given) < 2:
        raise ConfigError("DIR: give two adapters or more.", param="adapters")
    if density == 0.0:
        raise ConfigError("--density 0 keeps nothing; give more than 0.", param="density")
    from coserve.lora import merge as merging

    try:
        sources = [merging.read_source(path) for path, _ in given]
        made = merging.merge(sources, [weight for _, weight in given], method, rank=rank, density=density)
    except CoserveError as error:
        raise ConfigError(error.message, param=error.param) from None
    merging.write_merged(folder, made, merging.same_base(sources))
    lost = "" if method == "linear" else f", {made.error:.1%} of the merge lost by the cut to this rank"
    print(f"{folder}: {len(made.factors)} layers of rank {made.rank}{lost}")


def _source(word: str) -> tuple[Path, float]:
    path, equals, number = word.rpartition("=")
    if not equals or Path(word).expanduser().is_dir():
        return existing_dir(word, "DIR"), 1.0
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight) or weight == 0.0:
        raise ConfigError(f"DIR {word}: the weight must be a number other than 0.", param="adapters")
    return existing_dir(path, "DIR"), weight
