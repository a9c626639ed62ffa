"""Gradients against PEFT and autograd, over the product of what a job may be and how it may be computed.

fp32: the error of every tensor is at most the larger of 1e-5 of its largest gradient and twice PEFT's own.
bf16: the adapter's error is no larger than that of PEFT under autocast. The oracle is PEFT in float64
(rule I2; gradient_matrix.py has the axes and prints the figures of docs/numerics.md).
"""

from __future__ import annotations

import pytest
import torch

from tests.parity.gradient_matrix import (
    KV_HEADS,
    TARGETS,
    Case,
    Cut,
    Runner,
    cuts_of,
    root_mean_square,
    sample_of,
    whole_of,
)
from tests.parity.harness import FAMILIES

SAMPLE = [item for kind in FAMILIES for item in sample_of(kind, torch.float32, 3)]


def named(value: object) -> str:
    if isinstance(value, Case):
        return f"{value.kind}-{value.kv_heads}-{value.targets}-{value.rank}-{value.scaling}"
    return ""


def check(case: Case, cuts: list[Cut]) -> None:
    runner = Runner(case)
    for cut in cuts:
        errors = runner.run(cut)
        assert errors.loss <= 1e-6, cut
        assert errors.bound <= 1, cut


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("case,cuts", SAMPLE, ids=named)
def test_a_sample_in_float32(case: Case, cuts: list[Cut]) -> None:
    check(case, cuts)


def test_a_sample_in_bfloat16() -> None:
    pooled = []
    for kind in FAMILIES:
        ratios = [Runner(case).run(cuts[0]).whole for case, cuts in sample_of(kind, torch.bfloat16, 3)]
        assert root_mean_square(ratios) <= 1.1, kind  # of three cases; the whole matrix asks for 1
        pooled += ratios
    assert root_mean_square(pooled) <= 1


@pytest.mark.long
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("kv_heads", KV_HEADS)
@pytest.mark.parametrize("kind", FAMILIES)
def test_the_whole_in_float32(kind: str, kv_heads: int, targets: str) -> None:
    cases = [case for case in whole_of(kind) if case.dtype == torch.float32]
    mine = [case for case in cases if (case.kv_heads, case.targets) == (kv_heads, targets)]
    assert len(mine) == 14
    for number, case in enumerate(mine):
        check(case, cuts_of(number))


@pytest.mark.long
@pytest.mark.parametrize("kind", FAMILIES)
def test_the_whole_in_bfloat16(kind: str) -> None:
    cases = [case for case in whole_of(kind) if case.dtype == torch.bfloat16]
    ratios = [Runner(case).run(cut).whole for n, case in enumerate(cases) for cut in cuts_of(n)[:1]]
    assert len(ratios) == len(KV_HEADS) * len(TARGETS)
    assert root_mean_square(ratios) <= 1
