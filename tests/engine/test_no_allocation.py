"""A warm step asks the system for no memory, under the engine's allocator settings in its own process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from coserve.config import ALLOCATOR

STEPS = 50
PROGRAM = """
import json, resource, sys, tempfile
from itertools import cycle
from pathlib import Path
import torch
from coserve.config import DEMO_MODEL_DIR, EngineConfig
from coserve.core.sampling_params import SamplingParams
from coserve.engine import messages as m
from coserve.engine.local import LocalEngine
from coserve.training.dataset import TokenDataset
from coserve.training.job import JobSpec, LoraSpec, TrainingSpec

STEPS = int(sys.argv[1])
GREEDY = SamplingParams(max_tokens=1500, temperature=0.0, ignore_eos=True)
torch.set_num_threads(1)
local = LocalEngine(
    EngineConfig(model=str(DEMO_MODEL_DIR), kv_cache_memory_bytes=64 << 20, enable_prefix_caching=False)
)
local.engine.kv.arena.zero_()  # the pool is the operator's choice; its first touch is no step's


def look():
    mapped = int(Path("/proc/self/statm").read_text().split()[0])
    return mapped, resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def measure(run, warm):
    for _ in range(warm):
        run()
    before = look()
    for _ in range(STEPS):
        run()
    return [after - first for after, first in zip(look(), before)]


def tokens(count):
    return [10 + (7 * i) % 1900 for i in range(count)]


def prefill():
    local.add("prompt", tokens(300), SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True))
    local.run_until(lambda: "prompt" in local.finished)
    for kept in (local.tokens, local.finished, local.logprobs, local.sent):
        kept.clear()


def train():
    local.engine.step()
    found["optimizer steps"] += sum(isinstance(message, m.JobProgress) for message in local.sent)
    local.sent.clear()


found = {"optimizer steps": 0}
local.add("one", tokens(20), GREEDY)
found["decode"] = measure(local.engine.step, 60)
local.engine.handle(m.AbortRequests(request_ids=["one"]))
found["prefill"] = measure(prefill, 20)
turns = cycle([False, False, False, True])
local.engine.arrivals = lambda: next(turns)  # some units a step
with tempfile.TemporaryDirectory() as folder:
    TokenDataset.write(Path(folder) / "data", [(tokens(200), tokens(200))])
    training = TrainingSpec(
        batch_size=1, max_steps=1 << 20, n_epochs=1 << 20, checkpoint_steps=1 << 20, warmup_ratio=0.0
    )
    lora = LoraSpec(r=8, lora_alpha=16.0, target_modules=tuple(local.engine.model_config.linear_modules))
    spec = JobSpec(
        job_id="job", data_path=folder + "/data", checkpoint_dir=folder, seed=0, lora=lora, training=training
    )
    local.call(lambda call_id: m.SubmitJob(call_id=call_id, spec=spec))
    found["train"] = measure(train, 60)
    local.add("beside", tokens(20), GREEDY)
    found["decode beside training"] = measure(train, 60)
found["modules"] = [name for name in ("torch._dynamo", "transformers", "triton") if name in sys.modules]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found() -> dict[str, list[int]]:
    environment = {**os.environ, "GLIBC_TUNABLES": ALLOCATOR}
    command = [sys.executable, "-c", PROGRAM, str(STEPS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.parametrize("what", ["decode", "prefill", "train", "decode beside training"])
def test_a_warm_step_maps_no_memory(found, what) -> None:
    """No mmap, no brk; pages that Python's own small objects touch for the first time are all that faults."""
    pages, faults = found[what]
    assert pages == 0
    assert faults <= 2 * STEPS


def test_jobs_trained_meanwhile(found) -> None:
    assert found["optimizer steps"] >= 4


def test_nothing_heavy_is_imported_on_the_way(found) -> None:
    """torch's compiler would take seconds and 150 MB in the middle of somebody's answer."""
    assert found["modules"] == []
