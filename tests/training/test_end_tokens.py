"""End tokens that the base never learnt are told, others are not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from coserve.engine import messages as m
from coserve.kernels.linear import PackedLinear
from coserve.training.dataset import TokenDataset
from coserve.training.end_tokens import untrained_end_tokens, warning
from tests.invariants import world

V, H = 64, 16


def head(small: int | None = None) -> PackedLinear:
    weight = torch.randn(V, H, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    if small is not None:
        weight[small] *= 0.05
    return PackedLinear(weight)


def test_a_tiny_row_that_is_trained_on_is_told() -> None:
    """Qwen3#1064: a chat template's end token that the base never saw."""
    labels = np.array([-100, -100, 5, 9, 63])
    assert untrained_end_tokens(head(small=63), (7, 63), labels) == [63]
    assert "63" in warning([63]) and "lm_head" in warning([63])


def test_rows_like_the_others_are_not() -> None:
    assert untrained_end_tokens(head(), (63,), np.array([-100, 5, 63])) == []


def test_a_token_that_the_data_never_trains_is_not() -> None:
    assert untrained_end_tokens(head(small=63), (63,), np.array([-100, 5, 9])) == []


def test_ids_beyond_the_head_are_left_alone() -> None:
    assert untrained_end_tokens(head(), (V + 3,), np.array([5, V + 3])) == []


@pytest.mark.parametrize(("shrunk", "times_told"), [(True, 1), (False, 0)])
def test_a_job_says_so_once(tmp_path: Path, shrunk: bool, times_told: int) -> None:
    local = world.make_engine(world.make_model(tmp_path / "model"))
    (end,) = local.engine.model_config.eos_token_ids
    if shrunk:
        head = local.engine.decoder.head
        head.fill(end, head.rows(torch.tensor([end])) * 0.01)
    TokenDataset.write(tmp_path / "data", [([5, 9, 7, end], [-100, 9, 7, end])] * 4)
    spec = world.make_job(tmp_path / "data", tmp_path, n_epochs=3)
    world.submit(local, spec)
    world.finish(local, spec.job_id)
    told = [s for s in local.sent if isinstance(s, m.JobMessage) and "never to have learnt" in s.text]
    assert [(s.level, s.job_id) for s in told] == [("warn", spec.job_id)] * times_told
