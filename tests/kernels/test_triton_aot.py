"""Every Triton kernel compiles for every architecture, within its shared memory, hot ones without spills.

No device is needed. This must not run in the interpreter's process.
"""

from __future__ import annotations

import random

import pytest
import torch

pytest.importorskip("triton")

from coserve.kernels.triton.aot import SHARED_KIB, AotCase, all_cases, compile_case
from coserve.kernels.triton.tuning import tables

CASES = all_cases()
ALL = [(case, architecture) for case in CASES for architecture in SHARED_KIB]
SAMPLE = random.Random(7).sample(ALL, min(len(ALL), 12))


def expect_fits(case: AotCase, architecture: str) -> None:
    footprint = compile_case(case, architecture)
    assert footprint.shared <= SHARED_KIB[architecture] << 10, f"{case.name}: {footprint}"
    assert not (case.hot and footprint.spills), f"{case.name}: {footprint}"


@pytest.mark.parametrize("case, architecture", SAMPLE, ids=lambda value: getattr(value, "name", value))
def test_a_sample_fits(case: AotCase, architecture: str) -> None:
    expect_fits(case, architecture)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("architecture", SHARED_KIB)
def test_all_fit(architecture: str) -> None:
    for case in CASES:
        expect_fits(case, architecture)


def test_the_committed_table_names_kernels_and_settings_that_exist() -> None:
    known = {case.tuned.name: case.tuned.default.keys() for case in CASES}
    for architecture, kernels in tables().items():
        assert architecture in SHARED_KIB
        for name, settings in kernels.items():
            assert settings.keys() == known[name], f"{architecture} {name}"


def test_tuning_takes_a_setting_that_is_clearly_faster_and_passes_over_what_fails() -> None:
    from bench.tune import best_setting
    from coserve.kernels.triton.tuning import Tuned

    seconds = {16: 1.0, 32: 0.98, 64: None, 128: 0.9}
    tuned = Tuned("toy", {"B": 16}, ({"B": 32}, {"B": 64}, {"B": 128}), lambda device: lambda: None)

    def timer(run: object) -> float:
        found = seconds[tuned.on(torch.device("cpu"))["B"]]
        if found is None:
            raise RuntimeError("out of shared memory")
        return found

    best, times = best_setting(tuned, torch.device("cpu"), timer)
    assert best == {"B": 128} and len(times) == 3
    seconds[128] = 0.99
    assert best_setting(tuned, torch.device("cpu"), timer)[0] == {"B": 16}
    assert tuned.on(torch.device("cpu")) == {"B": 16}
