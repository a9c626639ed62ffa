"""A job's files: its tokenised data, its table of results, checkpoints that go."""

from __future__ import annotations

import asyncio
import csv
import io
import shutil
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from coserve.server.job_store import JobEvent
from coserve.tokenizer import Tokenizer
from coserve.training.batching import BatchPlan
from coserve.training.data_file import Counts, DataFile, bounded_lines
from coserve.training.dataset import TokenDataset
from coserve.training.job import TrainingSpec

# As in OpenAI's result files.
_COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")


@dataclass(frozen=True)
class Prepared:
    """What came of a training file."""

    counts: Counts

    @property
    def examples(self) -> int:
        """Rows that are trained on."""
        return self.counts.examples

    def remarks(self) -> list[tuple[str, str]]:
        """(level, message) for the job's log."""
        return [*_remarks(self.counts)]


def _remarks(counts: Counts) -> Iterator[tuple[str, str]]:
    yield (
        "info",
        f"{counts.examples} examples of {counts.tokens} tokens, {counts.trained_tokens} of them trained, in "
        f"an epoch; the longest has {counts.longest}",
    )
    if counts.truncated:
        yield (
            "warn",
            f"{counts.truncated} examples were cut at the maximal length and lost {counts.cut_tokens} tokens",
        )
    for reason, rows in counts.dropped.items():
        yield "warn", f"{rows} rows were dropped: {reason}"


class _Stopped(Exception):
    """Nobody wants the data any more."""


async def prepare(
    source: Path, target: Path, tokenizer: Tokenizer, max_length: int, method: str = "supervised"
) -> Prepared:
    """Tokenise `source` (JSONL) into the data set `target`, in a thread that a cancellation stops.

    Raises DatasetError with the bad lines, InvalidRequest when nothing is left to train on.
    """
    stop = threading.Event()
    try:
        return await asyncio.to_thread(_prepare, source, target, tokenizer, max_length, method, stop)
    finally:
        stop.set()


def _prepare(
    source: Path, target: Path, tokenizer: Tokenizer, max_length: int, method: str, stop: threading.Event
) -> Prepared:
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as file:
        rows = DataFile(_until(stop, bounded_lines(file)), tokenizer, max_length, method)
        TokenDataset.write(target, rows, pairs=rows.pairs)
    return Prepared(rows.counts)


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
    """Delete a checkpoint's directory; it vanishes at once and then goes."""
    gone = folder.with_name(folder.name + ".tmp")
    if folder.is_dir():
        shutil.rmtree(gone, ignore_errors=True)
        folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
