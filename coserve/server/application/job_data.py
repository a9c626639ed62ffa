"""A job's files: its tokenised data, its table of results, checkpoints that go."""

from __future__ import annotations

import asyncio
import csv
import io
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from coserve.server.job_store import JobEvent
from coserve.tokenizer import Tokenizer
from coserve.training.batching import BatchPlan
from coserve.training.data_file import Counts, DataFile, bounded_lines
from coserve.training.data_split import split
from coserve.training.dataset import TokenDataset
from coserve.training.job import TrainingSpec

# As in OpenAI's result files.
_COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")


@dataclass(frozen=True)
class Sources:
    """Uploaded files that a job learns from, and is scored on where it has its own file for that."""

    training: Path
    validation: Path | None = None


@dataclass(frozen=True)
class Prepared:
    """What came of a job's files: the training file's `counts`, the validation file's, and how many of the
    training file's examples were held out for validation."""

    counts: Counts
    validation: Counts | None = None
    held_out: int = 0

    @property
    def examples(self) -> int:
        """Rows that are trained on."""
        return self.counts.examples - self.held_out

    @property
    def tokens(self) -> int:
        """About how many tokens they have."""
        return -(-self.counts.tokens * self.examples // self.counts.examples)

    def remarks(self) -> list[tuple[str, str]]:
        """(level, message) for the job's log."""
        found = [*_remarks("training", self.counts)]
        if self.held_out:
            found.append(("info", f"{self.held_out} of the examples are held out for validation"))
        return found if self.validation is None else [*found, *_remarks("validation", self.validation)]


def _remarks(name: str, counts: Counts) -> Iterator[tuple[str, str]]:
    yield (
        "info",
        f"The {name} file has {counts.examples} examples of {counts.tokens} tokens, {counts.trained_tokens} "
        f"of them trained; the longest has {counts.longest}",
    )
    if counts.truncated:
        what = "example was" if counts.truncated == 1 else "examples were"
        yield (
            "warn",
            f"{counts.truncated} {what} cut at the maximal length "
            f"({name} file, {counts.cut_tokens} tokens lost)",
        )
    for reason, rows in counts.dropped.items():
        yield "warn", f"{rows} {'row was' if rows == 1 else 'rows were'} dropped ({name} file): {reason}"


class _Stopped(Exception):
    """Nobody wants the data any more."""


async def prepare(
    sources: Sources,
    folder: Path,
    tokenizer: Tokenizer,
    training: TrainingSpec,
    method: str,
    seed: int,
    vocab_size: int | None = None,
) -> Prepared:
    """Tokenise the files of a job into the data sets `data` and, where there is something to be scored on,
    `validation` in its folder, in a thread that a cancellation stops. `data` comes last. `vocab_size` is the
    model's, by default the tokenizer's.

    Raises DatasetError with the bad lines, InvalidRequest when nothing is left to train on.
    """
    stop = threading.Event()
    try:
        read = partial(
            DataFile,
            tokenizer=tokenizer,
            max_length=training.max_length,
            method=method,
            vocab_size=vocab_size,
        )
        return await asyncio.to_thread(_prepare, sources, folder, read, training, seed, stop)
    finally:
        stop.set()


def _prepare(
    sources: Sources,
    folder: Path,
    read: Callable[..., DataFile],
    training: TrainingSpec,
    seed: int,
    stop: threading.Event,
) -> Prepared:
    folder.mkdir(parents=True, exist_ok=True)
    data, validation, whole = (folder / name for name in ("data", "validation", "whole.tmp"))
    for old in (data, validation, whole):  # of a server that ended before it took note
        remove(old)

    def write(source: Path, target: Path, **settings: Any) -> DataFile:
        with source.open("rb") as opened:
            file = read(_until(stop, bounded_lines(opened)), **settings)
            TokenDataset.write(target, file, pairs=file.pairs)
        return file

    scored: Counts | None = None
    held_out = 0
    if sources.validation is not None:
        file = write(sources.training, whole)
        scored = write(sources.validation, validation, param="validation_file", like=file.kind).counts
        whole.rename(data)
    elif training.validation_split:
        file = write(sources.training, whole)
        held_out = split(TokenDataset.open(whole), training.validation_split, seed, data, validation)
        remove(whole)
    else:
        file = write(sources.training, data)
    return Prepared(file.counts, scored, held_out)


def _until(stop: threading.Event, lines: Iterable[bytes]) -> Iterator[bytes]:
    for line in lines:
        if stop.is_set():
            raise _Stopped
        yield line


def total_steps(data: Path, training: TrainingSpec, seed: int) -> int:
    """Optimizer steps of a job over its tokenised data, as the engine will count them."""
    return BatchPlan(TokenDataset.open(data), training, seed).total_steps


def results_csv(events: Sequence[JobEvent]) -> bytes:
    """One line for each optimizer step; cells are blank where nothing was measured."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for event in sorted((event for event in events if event.type == "metrics"), key=lambda event: event.step):
        writer.writerow(
            (event.step, event.loss, event.accuracy, event.valid_loss, event.valid_accuracy)
        )
    return text.getvalue().encode()


def remove(folder: Path) -> None:
    """Delete a directory, if it is there; it vanishes at once and then goes."""
    gone = folder.with_name(folder.name + ".tmp")
    if folder.is_dir():
        shutil.rmtree(gone, ignore_errors=True)
        folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
