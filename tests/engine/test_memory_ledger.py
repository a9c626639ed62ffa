"""The ledger sums to the process's memory as the kernel counts it: at rest, under load, while training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from coserve.config import ALLOCATOR
from coserve.core.block_pool import BlockPool
from coserve.engine.memory_ledger import CHUNK_PAGES, TouchedPages

PROGRAM = """
import json, os, sys, tempfile
from array import array
from pathlib import Path
import torch
from coserve.config import DEMO_MODEL_DIR, EngineConfig
from coserve.core.sampling_params import SamplingParams
from coserve.engine import messages as m
from coserve.engine.local import LocalEngine
from coserve.training.dataset import TokenDataset
from coserve.training.job import JobSpec, LoraSpec, TrainingSpec

torch.set_num_threads(1)
local = LocalEngine(EngineConfig(model=str(DEMO_MODEL_DIR), kv_cache_memory_bytes=96 << 20))
engine, page = local.engine, os.sysconf("SC_PAGE_SIZE")
arena = engine.kv.arena
found = {}


def touched():
    first = arena.data_ptr() // page
    with open("/proc/self/pagemap", "rb") as pages:
        pages.seek(8 * first)
        entries = array("Q", pages.read(8 * (-(-(arena.data_ptr() + arena.nbytes) // page) - first)))
    return page * sum(entry >> 63 for entry in entries)


def look(phase):
    rollup = Path("/proc/self/smaps_rollup").read_text()
    resident = 1024 * next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Rss:"))
    owners = engine.stats.snapshot(0).memory_bytes
    found[phase] = owners | {"process": resident + max(0, arena.nbytes - touched())}


def tokens(count, by):
    return [10 + (by * i) % 1900 for i in range(count)]


def serve(phase):
    for number in range(6):
        sampling = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
        local.add(f"{phase}{number}", tokens(300, 7 + number), sampling)
    for _ in range(12):
        engine.step()
    look(phase)
    local.run_until(lambda: not engine.scheduler.has_requests)


look("start")
serve("load")
serve("load again")
with tempfile.TemporaryDirectory() as folder:
    TokenDataset.write(Path(folder) / "data", [(tokens(300, 7), tokens(300, 7))] * 4)
    lora = LoraSpec(r=16, lora_alpha=16.0, target_modules=tuple(engine.model_config.linear_modules))
    spec = JobSpec(
        job_id="job", data_path=folder + "/data", checkpoint_dir=folder + "/out", seed=0, lora=lora,
        training=TrainingSpec(batch_size=2, max_steps=3, n_epochs=9, checkpoint_steps=9),
    )
    local.call(lambda call_id: m.SubmitJob(call_id=call_id, spec=spec))
    local.run_until(lambda: engine.blocks.num_extent_slabs > 0)
    look("training begins")
    local.run_until(lambda: any(isinstance(news, m.JobProgress) for news in local.sent))
    serve("training beside load")
    local.run_until(lambda: any(getattr(news, "status", "") == "succeeded" for news in local.sent))
look("drained")
print(json.dumps(found))
"""
PHASES = ("start", "load", "load again", "training begins", "training beside load", "drained")


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, int]]:
    environment = {**os.environ, "GLIBC_TUNABLES": ALLOCATOR}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


needs_pagemap = pytest.mark.skipif(not Path("/proc/self/pagemap").exists(), reason="needs /proc/self/pagemap")


@needs_pagemap
@pytest.mark.parametrize("phase", PHASES)
def test_the_owners_sum_to_the_process(found, phase) -> None:
    owners = dict(found[phase])
    process = owners.pop("process")
    assert abs(sum(owners.values()) - process) <= 0.05 * process
    assert all(size >= 0 for size in owners.values())


@needs_pagemap
def test_what_is_left_over_is_small_and_does_not_grow(found) -> None:
    """Else the sum would be right whatever the owners say: a missing owner's bytes would be left over."""
    process = found["start"]["process"]
    assert found["start"]["workspace"] == 0
    assert all(abs(found[phase]["runtime"] - found["start"]["runtime"]) < 0.05 * process for phase in PHASES)
    warm = found["load"]["workspace"]
    assert all(found[phase]["workspace"] - warm < 0.05 * process for phase in PHASES)


@needs_pagemap
def test_each_owner_has_what_is_its_own(found) -> None:
    pool = {phase: sum(found[phase][owner] for owner in ("kv", "activations", "free")) for phase in PHASES}
    assert len(set(pool.values())) == 1
    assert found["start"]["kv"] == 0 < found["load"]["kv"]
    training, drained = found["training beside load"], found["drained"]
    assert min(training["activations"], training["adapters"], training["optimizer"]) > 0
    assert drained["activations"] == drained["optimizer"] == 0
    assert drained["adapters"] == training["adapters"], "the job's rows wait for its version"


@needs_pagemap
def test_touched_pages_are_counted_as_they_are_written() -> None:
    page = os.sysconf("SC_PAGE_SIZE")
    memory = torch.frombuffer(bytearray(1), dtype=torch.uint8)
    assert TouchedPages(memory).touched((0, 1)) == page
    chunk = CHUNK_PAGES * page
    arena = torch.empty(3 * chunk, dtype=torch.uint8)
    pages = TouchedPages(arena)
    before = pages.touched((0, chunk), (2 * chunk, 3 * chunk))
    arena[:chunk] = 1
    after = pages.touched((0, chunk), (0, chunk))
    assert chunk <= after <= 2 * chunk
    assert before < after
    assert pages.touched((chunk, chunk)) == 0


def test_the_pool_knows_what_nobody_ever_had() -> None:
    pool = BlockPool(32)
    assert pool.never_owned == (0, 32)
    blocks = pool.allocate(3) or []
    extent = pool.reserve_extent(5)
    assert pool.never_owned == (3, 27)
    pool.release(blocks)
    pool.release_extent(extent or 0)
    assert pool.never_owned == (3, 27)
    pool.allocate(1)
    assert pool.never_owned == (3, 27), "the lowest free slab goes first"
