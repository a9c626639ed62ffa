"""More adapters than places, in a real engine: everybody is served, with his own adapter, in bounded time."""

from __future__ import annotations

from pathlib import Path

import pytest

from coserve.core import adapter_turns
from coserve.engine import messages as m
from tests.invariants import world

PROMPT = list(range(3, 40))
SHORT = world.SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
LONG = world.SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def expected(model: Path, adapters: list[m.AdapterRef]) -> dict[str, list[int]]:
    """What each adapter, and the base, says to the prompt."""
    roomy = world.make_engine(model)
    answers = {ref.name: roomy.generate(PROMPT, LONG, ref) for ref in adapters}
    return answers | {"base": roomy.generate(PROMPT, LONG)}


def test_a_batch_of_more_adapters_than_may_be_in_use(model, adapters, expected) -> None:
    """sglang#23141: three adapters and the base with room for one."""
    tight = world.make_engine(model, max_loras=1, max_cpu_loras=1)
    refs = [*adapters, None] * 3
    for number, ref in enumerate(refs):
        tight.add(str(number), PROMPT, LONG, ref)
    for _ in range(5000):
        tight.engine.step()
        in_use = {r.adapter for r in tight.engine.scheduler.running if r.adapter}
        assert len(in_use) <= 1
        if len(tight.finished) == len(refs):
            break
    for number, ref in enumerate(refs):
        assert tight.tokens[str(number)] == expected[ref.name if ref else "base"]


def test_a_stream_of_one_adapter_lets_another_in(model, adapters, expected, monkeypatch) -> None:
    """sglang PR #15129, vllm PR #15422: B waits behind endless A; base and A go on meanwhile."""
    monkeypatch.setattr(adapter_turns, "DRAIN_AFTER", 0.0)
    local = world.make_engine(model, max_loras=1)
    a, b = adapters[:2]
    local.add("a-0", PROMPT, LONG, a)
    local.run_until(lambda: "a-0" in local.tokens, 5000)
    local.add("b", PROMPT, LONG, b)
    for number in range(1, 60):
        local.add(f"a-{number}", PROMPT, SHORT, a)
        local.add(f"base-{number}", PROMPT, SHORT)
        local.engine.step()
        local.engine.step()
        if "b" in local.finished:
            break
    assert local.tokens["b"] == expected[b.name]
    assert f"a-{number}" not in local.finished, "B didn't wait for those behind it"
    local.run_until(lambda: len(local.finished) == 2 * number + 2, 5000)
    assert all(local.tokens[f"a-{n}"] == expected[a.name][:4] for n in range(1, number))
    assert all(local.tokens[f"base-{n}"] == expected["base"][:4] for n in range(1, number))


def test_who_waits_for_files_holds_nobody_up(model, adapters, expected, monkeypatch) -> None:
    """The first in the queue waits for a disk; the base and adapters that are there run."""
    local = world.make_engine(model)
    local.generate(PROMPT, SHORT, adapters[0])
    loader = local.engine.adapters._loader
    real, held = loader._threads.submit, []
    monkeypatch.setattr(loader._threads, "submit", lambda *call: held.append(call) or _never())
    local.add("slow", PROMPT, LONG, adapters[1])
    local.add("resident", PROMPT, LONG, adapters[0])
    local.add("base", PROMPT, LONG)
    local.run_until(lambda: {"resident", "base"} <= local.finished.keys(), 5000)
    assert "slow" not in local.tokens and local.engine.scheduler.num_deferred == 1
    assert not local.engine.has_work, "nothing to do but to wait"
    loader._reading[adapters[1].digest] = real(*held[0]), 0
    local.run_until(lambda: "slow" in local.finished, 100_000)
    assert local.tokens["slow"] == expected[adapters[1].name]


def _never():  # type: ignore[no-untyped-def]
    from concurrent.futures import Future

    return Future()


def test_a_request_that_is_aborted_while_its_adapter_is_read_leaves_nothing(model, adapters) -> None:
    local = world.make_engine(model)
    local.add("r", PROMPT, LONG, adapters[0])
    local.engine.step()
    local.engine.handle(m.AbortRequests(request_ids=["r"]))
    local.run_until(lambda: not local.engine.adapters.is_loading, 100_000)
    assert not local.engine.has_work and not local.engine.adapters._requests
    assert world.rows_are_idle(local) and world.pool_is_empty(local)


def test_a_version_with_other_weights_answers_as_a_cold_start_does(model, adapters, expected) -> None:
    """vllm#42125: the same name with new weights, with the old one's prefixes in the cache."""
    local = world.make_engine(model)
    old, new = adapters[0], m.AdapterRef(adapters[0].name, 2, adapters[1].digest, adapters[1].path)
    assert local.generate(PROMPT, LONG, old) == expected[adapters[0].name]
    assert local.generate(PROMPT, LONG, new) == expected[adapters[1].name]
    assert local.generate(PROMPT, LONG, old) == expected[adapters[0].name]


def test_files_that_changed_since_they_were_published_are_an_error(model, adapters) -> None:
    """Never another adapter's answer under this version's name."""
    local = world.make_engine(model)
    lied = m.AdapterRef("a", 1, adapters[0].digest, adapters[1].path)
    local.add("r", PROMPT, LONG, lied)
    local.run_until(lambda: "r" in local.finished, 5000)
    error = local.finished["r"].error
    assert error is not None and "have changed" in error.message and not local.tokens.get("r")


def test_how_often_each_tier_had_it_is_told(model, adapters) -> None:
    local = world.make_engine(model)
    for _ in range(2):
        local.generate(PROMPT, SHORT, adapters[0])
    local.engine.slots.unload(adapters[0].digest)
    local.generate(PROMPT, SHORT, adapters[0])
    stats = local.engine.stats.snapshot(1)
    told = local.engine.adapters.found_in
    assert told == {"disk": 1, "device": 1, "host": 1}
    assert stats.adapter_tiers == {adapters[0].digest: "device"}
    assert local.engine.stats.snapshot(0).adapter_tiers is None, "nothing has changed"
