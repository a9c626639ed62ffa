"""Files of any length in constant memory, from the upload to the data sets; eight bytes a row are kept."""

from __future__ import annotations

import asyncio
import json
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from coserve.server.application.job_data import Sources, prepare
from coserve.training.batching import BatchPlan
from coserve.training.data_file import DataFile
from coserve.training.dataset import TokenDataset
from coserve.training.job import TrainingSpec
from tests.training.data_rows import ANSWER, TOKENIZER, USER

ROW = json.dumps({"messages": [USER, ANSWER, USER, ANSWER], "id": "x" * 200}).encode() + b"\n"
BYTES_A_ROW = 100  # offsets, orders and lengths; the row itself has 400 in the file, its values more


def peak(work: Callable[[], object]) -> int:
    """Bytes of the most that was held at once."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def lines(count: int) -> Iterator[bytes]:
    return (ROW for _ in range(count))


def test_rows_pass_through(tmp_path: Path) -> None:
    def read(count: int) -> int:
        file = DataFile(lines(count), TOKENIZER, 0)
        return peak(lambda: TokenDataset.write(tmp_path / str(count), file))

    few = read(50)
    many = read(500)
    assert len(TokenDataset.open(tmp_path / "500")) == 500
    assert many - few < 450 * 8 * 4 + 64 * 1024


def test_bad_rows_leave_no_trace() -> None:
    def read(count: int) -> int:
        file = DataFile((line for _ in range(count) for line in (b"{}\n", b"\n")), TOKENIZER, 0)

        def run() -> None:
            with pytest.raises(ValueError, match="bad lines"):
                try:
                    list(file)
                except Exception as error:
                    raise ValueError(str(error)) from None

        return peak(run)

    few, many = read(100), read(3000)
    assert many - few < 64 * 1024


@pytest.mark.long
def test_a_hundred_thousand_lines_from_the_upload_to_the_plan(tmp_path: Path) -> None:
    rows = 120_000
    source = tmp_path / "upload"
    with source.open("wb") as file:
        file.writelines(
            json.dumps({"text": f"hello {i}", "id": "x" * 300}).encode() + b"\n" for i in range(rows)
        )
    training = TrainingSpec(validation_split=0.1, packing=True, max_length=512)

    def run() -> None:
        asyncio.run(prepare(Sources(source), tmp_path / "job", TOKENIZER, training, "supervised", 1))
        plan = BatchPlan(TokenDataset.open(tmp_path / "job" / "data"), training, 1)
        assert plan.step(plan.total_steps).tokens > 0

    used = peak(run)
    assert len(TokenDataset.open(tmp_path / "job" / "data")) == rows * 9 // 10
    assert used < rows * BYTES_A_ROW + 4 * 2**20 < source.stat().st_size
