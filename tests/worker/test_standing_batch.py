"""Decoding from tapes gives the tokens that decoding layer by layer gives."""

from __future__ import annotations

import pytest

from coserve.engine import messages as m
from coserve.kernels import dispatch
from coserve.worker import standing_batch
from coserve.worker.standing_batch import FEWEST_BLOCKS
from tests.invariants import world

pytestmark = pytest.mark.skipif(dispatch.native is None, reason="tapes are of the compiled module's calls")
LONG = world.SamplingParams(max_tokens=90, temperature=0.0, ignore_eos=True, logprobs=3)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return world.make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory):
    return world.make_adapter(model, tmp_path_factory.mktemp("adapter") / "a", 4, seed=1)


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """Layouts with adapters are recorded in their second step, as the base's are."""
    monkeypatch.setattr(standing_batch, "STEPS_WITH_ADAPTERS", 2)


@pytest.fixture
def without_tapes(monkeypatch):
    """Engines made inside decode layer by layer."""

    def make(*args, **settings):
        local = world.make_engine(*args, **settings)
        monkeypatch.setattr(local.engine.runner._standing, "takes", lambda spans: False)
        return local

    return make


def tapes(local) -> list:
    batches = local.engine.runner._standing._batches.values()
    return [batch._tape for batch in batches if batch._tape is not None]


def run(local, requests):
    for name, (prompt, adapter) in requests.items():
        local.add(name, prompt, LONG, adapter)
    local.run_until(lambda: all(name in local.finished for name in requests))
    return [local.tokens[name] for name in requests]


@pytest.mark.parametrize("block_size", [1, 4])
def test_tokens_are_the_same_to_the_end_of_a_long_answer(model, adapter, without_tapes, block_size) -> None:
    """Block tables outgrow their first width; requests with and without adapter, of unequal lengths."""
    requests = {"base": ([5, 9, 3], None), "tuned": ([8] * 40, adapter), "again": ([5, 9, 3, 4], adapter)}
    settings = {"block_size": block_size, "enable_prefix_caching": False}
    expected = run(without_tapes(model, **settings), requests)
    local = world.make_engine(model, **settings)
    assert run(local, requests) == expected
    assert len(tapes(local)) >= 2
    assert (
        max(len(batch._tables[0]) for batch in local.engine.runner._standing._batches.values())
        > FEWEST_BLOCKS
    )


def test_requests_that_come_and_go_change_no_token(model, without_tapes) -> None:
    prompts = [[3 + i] * (1 + 7 * i) for i in range(5)]
    expected = [without_tapes(model).generate(prompt, LONG) for prompt in prompts]
    local = world.make_engine(model)
    for index, prompt in enumerate(prompts):
        local.add(str(index), prompt, LONG)
        for _ in range(11):
            local.engine.step()
    local.run_until(lambda: len(local.finished) == len(prompts))
    assert [local.tokens[str(index)] for index in range(len(prompts))] == expected


def test_an_adapter_placed_elsewhere_is_found_there(model, adapter, tmp_path, without_tapes) -> None:
    """The tables of a tape name rows; an unload and a load in between move them."""
    other = world.make_adapter(model, tmp_path / "b", 8, seed=2)
    expected = [run(without_tapes(model), {"x": ([5, 9], ref)})[0] for ref in (adapter, other)]
    assert expected[0] != expected[1]
    local = world.make_engine(model)
    assert run(local, {"first": ([5, 9], adapter)}) == expected[:1]
    for ref, name in ((other, "second"), (adapter, "third"), (other, "fourth")):
        for loaded in (adapter, other):
            local.call(lambda i, d=loaded.digest: m.UnloadAdapter(call_id=i, digest=d))
        assert run(local, {name: ([5, 9], ref)}) == [expected[ref is other]]


def test_tapes_keep_within_their_memory(model, monkeypatch) -> None:
    monkeypatch.setattr("coserve.worker.standing_batch.KEPT_BYTES", 30_000)
    local = world.make_engine(model)
    for rows in range(1, 8):
        run(local, {f"{rows}/{i}": ([3 + i], None) for i in range(rows)})
    held = sum(tape.nbytes for tape in tapes(local))
    assert tapes(local) and held <= 2 * 30_000


def test_prompts_and_the_references_have_no_tapes(model) -> None:
    local = world.make_engine(model)
    local.add("r", [4] * 9, LONG)
    plan = local.engine.scheduler.schedule(0.0)
    assert not local.engine.runner._standing.takes(plan.inference)
    local.engine.step()
    plan = local.engine.scheduler.schedule(0.0)
    assert local.engine.runner._standing.takes(plan.inference)
    with dispatch.use_backend("reference"):
        assert not local.engine.runner._standing.takes(plan.inference)


def test_a_mix_of_adapters_is_recorded_once_it_has_lasted(model, adapter, monkeypatch) -> None:
    monkeypatch.setattr(standing_batch, "STEPS_WITH_ADAPTERS", 20)
    local = world.make_engine(model)
    prompt, short = [5, 9, 3], world.SamplingParams(max_tokens=15, temperature=0.0, ignore_eos=True)
    local.generate(prompt, short, adapter)
    assert not tapes(local)
    local.generate(prompt, LONG, adapter)
    assert len(tapes(local)) == 1
    local.generate(prompt, short)
    assert len(tapes(local)) == 2, "the base's at once"


def test_mixes_of_adapters_that_come_and_go_leave_tapes_alone(model, adapter, monkeypatch) -> None:
    monkeypatch.setattr(standing_batch, "STEPS_WITH_ADAPTERS", 1000)
    monkeypatch.setattr(standing_batch, "MOST_LAYOUTS", 3)
    local = world.make_engine(model)
    short = world.SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    local.generate([5, 9, 3], short)
    kept = tapes(local)
    for rows in (1, 2, 3, 4, 5):
        run(local, {f"{rows}-{n}": ([5, 9, n + 2], adapter) for n in range(rows)})
    assert len(kept) == 1 and tapes(local) == kept
    assert len(local.engine.runner._standing._batches) <= 3
