"""I1 and I2 to the bit, in fp32 and bf16: a row's result does not depend on what shares its batch."""

from __future__ import annotations

import pytest

from coserve.core.training_sequence import TrainingSequence
from coserve.engine import messages as m

from . import world

PROMPTS = [[5, 9, 3, 40], list(range(2, 75)), [7] * 21, [90, 2, 33, 8, 61, 12] * 3, [11]]
SAMPLING = world.SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True, logprobs=2)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def dtype(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def adapter(wide_model, tmp_path_factory) -> m.AdapterRef:
    return world.make_adapter(wide_model, tmp_path_factory.mktemp("adapters") / "wide", 4, seed=4)


@pytest.fixture(scope="module")
def engine(wide_model, dtype):
    """Makes engines with the wide model in one dtype."""
    settings = {"dtype": dtype, "kv_cache_memory_bytes": 64 << 20}
    return lambda **more: world.make_engine(wide_model, **(settings | more))


@pytest.fixture(scope="module")
def alone(engine, adapter):
    """Answers with log-probabilities, each request in an engine of its own time: base and adapter."""
    local = engine(enable_prefix_caching=False)
    answers = []
    for index, prompt in enumerate(PROMPTS):
        for ref in (None, adapter):
            name = f"{index}/{ref is adapter}"
            local.add(name, prompt, SAMPLING, ref)
            local.run_until(lambda name=name: name in local.finished)
            answers.append(answer(local, name))
    assert answers[0] != answers[1]
    return answers


def answer(local, name):
    """Tokens and the log-probabilities that their logits gave, exactly."""
    return local.tokens[name], local.logprobs[name]


def together(local, adapter) -> list:
    """The same requests side by side."""
    names = []
    for index, prompt in enumerate(PROMPTS):
        for ref in (None, adapter):
            names.append(f"{len(local.finished)}/{index}/{ref is adapter}")
            local.add(names[-1], prompt, SAMPLING, ref)
            local.engine.step()
    local.run_until(lambda: all(name in local.finished for name in names))
    return [answer(local, name) for name in names]


@pytest.mark.parametrize("most_tokens", [16, 23, 256])
def test_batch_mates_and_chunks_change_no_bit(engine, adapter, alone, most_tokens) -> None:
    local = engine(enable_prefix_caching=False, max_num_batched_tokens=most_tokens)
    assert together(local, adapter) == alone


def test_a_cached_prefix_changes_no_bit(engine, adapter, alone) -> None:
    local = engine()
    assert together(local, adapter) == alone
    assert together(local, adapter) == alone
    assert local.engine.scheduler.prefixes.hits > 0


def test_training_beside_it_changes_no_bit(engine, adapter, alone, data, tmp_path) -> None:
    local = engine(enable_prefix_caching=False)
    world.submit(local, world.make_job(data, tmp_path, n_epochs=1000))
    for _ in range(30):
        assert together(local, adapter) == alone
        if len(world.progress(local, "ftjob-1")) >= 2:
            return
    raise AssertionError("no optimizer step was done beside the requests")


def test_requests_beside_it_change_no_bit_of_a_job(engine, adapter, data, tmp_path) -> None:
    """Loss, gradient norm and adapter: with the device to itself, and cut into windows beside requests."""
    quiet, busy = engine(), engine(max_num_batched_tokens=100)
    specs = [world.make_job(data, tmp_path / name, n_epochs=1) for name in ("quiet", "busy")]
    world.submit(quiet, specs[0])
    world.finish(quiet, "ftjob-1")
    busy.engine.arrivals = lambda: True
    world.submit(busy, specs[1])
    while world.status_of(busy, "ftjob-1") not in ("succeeded", "failed"):
        together(busy, adapter)
    assert world.progress(busy, "ftjob-1") == world.progress(quiet, "ftjob-1")
    assert world.same_bits(world.final_adapter(specs[1]), world.final_adapter(specs[0]))


def test_windows_at_tile_edges_change_no_bit_of_a_job(engine, data, tmp_path) -> None:
    specs = [world.make_job(data, tmp_path / str(w), n_epochs=1, window_tokens=w) for w in (0, 64, 128)]
    for spec in specs:
        local = engine()
        world.submit(local, spec)
        world.finish(local, spec.job_id)
    adapters = [world.final_adapter(spec) for spec in specs]
    assert world.same_bits(adapters[1], adapters[0]) and world.same_bits(adapters[2], adapters[0])


@pytest.mark.parametrize("cut", [1, 7, 24, 40])
def test_forward_windows_cut_anywhere_change_no_bit(engine, data, tmp_path, monkeypatch, cut) -> None:
    """Beside requests windows are as wide as a step can pay for."""
    specs = [world.make_job(data, tmp_path / name, n_epochs=1) for name in ("whole", "cut")]
    for spec in specs:
        local = engine()
        world.submit(local, spec)
        world.finish(local, spec.job_id)
        monkeypatch.setattr(
            TrainingSequence, "window", lambda self, most, *_, **__: min(cut, self.forward_owed, most)
        )
    assert world.same_bits(*map(world.final_adapter, specs))
