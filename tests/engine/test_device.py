"""How many threads compute, by affinity, the cgroup's quota and the model's size; how large the pool is."""

from __future__ import annotations

import os

import pytest
import torch

from coserve.config import DEMO_MODEL_DIR, EngineConfig
from coserve.engine import device
from coserve.models.config import ModelConfig
from coserve.worker.kv_tensors import slab_bytes


@pytest.fixture
def cores(monkeypatch) -> None:
    """Four cores of two hardware threads each."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(device, "_siblings", lambda cpu: f"{cpu % 4},{cpu % 4 + 4}")


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(None, 4), ("max 100000", 4), ("250000 100000", 2), ("50000 100000", 1), ("900000 100000", 4)],
)
def test_cores_are_counted_once_and_the_quota_holds(cores, tmp_path, limit, expected) -> None:
    if limit is not None:
        (tmp_path / "cpu.max").write_text(limit + "\n")
    assert device.usable_cores(tmp_path) == expected


@pytest.mark.parametrize(("quota", "expected"), [("-1", 4), ("300000", 3)])
def test_the_older_cgroups_say_it_in_two_files(cores, tmp_path, quota, expected) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(quota + "\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert device.usable_cores(tmp_path) == expected


def test_two_threads_of_one_core_count_once_where_the_mask_has_both(cores, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 5, 2})
    assert device.usable_cores(tmp_path) == 2


def test_the_pool_keeps_to_what_the_cgroup_allows(monkeypatch) -> None:
    """Else a container with little memory on a large machine has a pool that it is killed for filling."""
    config, model = EngineConfig(model=""), ModelConfig.from_dir(DEMO_MODEL_DIR)
    slab = slab_bytes(model, config.block_size, torch.float32)
    monkeypatch.setattr(device, "memory_limit", lambda: 1000 * slab)
    blocks = device.memory_plan(config, model, 256, torch.device("cpu"), torch.float32)
    assert blocks == 450, "half of nine tenths"
