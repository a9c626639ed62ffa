"""The whole engine on the Triton kernels, beside the CPU's: chat, two adapters, a job, all in one engine.

Steps without training windows go through graphs, whose replays are the functions themselves here: padded
buckets, the static tables of adapters.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import coserve.kernels as kernels
from coserve.core.sampling_params import SamplingParams
from coserve.kernels.dispatch import use_backend
from coserve.kernels.triton import lora_fused
from coserve.worker import cuda_graph
from coserve.worker.cuda_graph import BucketedForward
from tests.invariants import world
from tests.triton.launches import Noted
from tests.worker.replayed import ReplayedFunctions

ANSWER = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
BASE_PRODUCTS = {"_linear_reference", "_input_gradient_reference"}  # torch's own unless --deterministic
PROMPTS = [[5, 9, 3, 40], list(range(3, 15))]


def no_reference(reference: Callable[..., Any], used: set[str]) -> Callable[..., Any]:
    """`reference` as triton_or_reference knows it, that notes when it runs."""

    @functools.wraps(reference)
    def run(*args: Any, **kwargs: Any) -> Any:
        used.add(reference.__name__)
        return reference(*args, **kwargs)

    return run


@pytest.fixture
def references(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """Names of the references that ran."""
    used: set[str] = set()
    for info in pkgutil.iter_modules(kernels.__path__):
        if info.name.startswith("_") or info.name == "triton":
            continue
        module = importlib.import_module(f"coserve.kernels.{info.name}")
        for name, value in list(vars(module).items()):
            if name.startswith("_") and name.rstrip("_").endswith("_reference"):
                monkeypatch.setattr(module, name, no_reference(value, used))
    yield used


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[Any]]:
    folder = tmp_path_factory.mktemp("engine")
    model = world.make_model(folder / "model")
    adapters = [world.make_adapter(model, folder / f"rank{rank}", rank, rank) for rank in (3, 8)]
    return model, world.make_data(folder / "data", examples=4), adapters


Story = tuple[list[list[int]], list[tuple[int, float, float]], dict[str, torch.Tensor]]


def story(
    model: Path, data: Path, adapters: list[Any], folder: Path, graphs: ReplayedFunctions | None = None
) -> Story:
    """What requests with and without adapters answer beside a job, and the job's steps and adapter."""
    engine = world.make_engine(model, max_num_batched_tokens=64)
    if graphs is not None:
        own = engine.engine
        own.runner._graphs = BucketedForward(own.decoder, own.kv, own.pool, own.slots, graphs)
    spec = world.make_job(data, folder, n_epochs=1, batch_size=1)
    for number, prompt in enumerate(PROMPTS):
        for name, adapter in (("base", None), ("3", adapters[0]), ("8", adapters[1])):
            engine.add(f"{number}{name}", prompt, ANSWER, adapter)
    world.submit(engine, spec)
    world.finish(engine, spec.job_id)
    answers = [engine.tokens[key] for key in sorted(engine.tokens)]
    return answers, world.progress(engine, spec.job_id), world.final_adapter(spec)


def test_the_engine_answers_and_trains_as_on_the_cpu(
    files: tuple[Path, Path, list[Any]], tmp_path: Path, references: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with use_backend("auto"):
        answers, steps, adapter = story(*files, tmp_path / "cpu")
    references.clear()
    graphs = ReplayedFunctions()
    monkeypatch.setattr(cuda_graph, "MOST_SEGMENTS", 4)
    fused = Noted(lora_fused.fused_shrink_kernel, "NORMS")
    monkeypatch.setattr(lora_fused, "fused_shrink_kernel", fused)
    got_answers, got_steps, got_adapter = story(*files, tmp_path / "triton", graphs)
    assert graphs.plays
    norms, activations = (fused.launches.count(norms) for norms in (True, False))
    assert norms and activations  # before q, k, v and gate, up; before down
    assert references <= BASE_PRODUCTS
    assert got_answers == answers
    assert [step for step, _, _ in got_steps] == [step for step, _, _ in steps]
    for got, want in zip(got_steps, steps, strict=True):
        assert got[1:] == pytest.approx(want[1:], rel=2e-5)
    assert got_adapter.keys() == adapter.keys()
    for name, want in adapter.items():
        torch.testing.assert_close(got_adapter[name], want, rtol=1e-3, atol=2e-5, msg=name)
