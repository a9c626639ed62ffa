"""I4: a request that began on a version ends on it; unloading and loading wait for nobody."""

from __future__ import annotations

from coserve.engine import messages as m

from . import world

PROMPT = [4, 8, 15, 16, 23, 42]
LONG = world.SamplingParams(max_tokens=80, temperature=0.0, ignore_eos=True)


def test_unload_lets_running_requests_end_on_their_version(model, adapters) -> None:
    quiet = world.make_engine(model)
    old, new = (quiet.generate(PROMPT, LONG, adapter) for adapter in adapters[:2])
    local = world.make_engine(model)
    local.add("old", PROMPT, LONG, adapters[0])
    for _ in range(10):
        local.engine.step()
    reply = local.call(lambda i: m.UnloadAdapter(call_id=i, digest=adapters[0].digest))
    assert reply.error is None
    local.add("new", PROMPT, LONG, adapters[1])
    local.run_until(lambda: len(local.finished) == 2, 2000)
    assert (local.tokens["old"], local.tokens["new"]) == (old, new)
    assert adapters[0].digest not in local.engine.slots, "its rows go with the last reader"


def test_loading_another_adapter_disturbs_nobody(model, adapters) -> None:
    """vllm#47724: an adapter loaded at run time took a slot that requests in flight still read."""
    quiet = world.make_engine(model)
    expected = quiet.generate(PROMPT, LONG, adapters[0])
    local = world.make_engine(model)
    local.add("a", PROMPT, LONG, adapters[0])
    for step in range(60):
        if step % 10 == 5:
            local.engine.handle(m.LoadAdapter(call_id=1000 + step, adapter=adapters[1 + step % 2]))
        local.engine.step()
    local.run_until(lambda: "a" in local.finished, 2000)
    assert local.tokens["a"] == expected


def test_an_unloaded_adapter_comes_back_the_same(model, adapters) -> None:
    local = world.make_engine(model)
    first = local.generate(PROMPT, LONG, adapters[2])
    local.call(lambda i: m.UnloadAdapter(call_id=i, digest=adapters[2].digest))
    assert adapters[2].digest not in local.engine.adapters.tiers()
    assert local.generate(PROMPT, LONG, adapters[2]) == first
