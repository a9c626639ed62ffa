"""I3: a request for an adapter gets that adapter's output or an error."""

from __future__ import annotations

from pathlib import Path

from coserve.engine import messages as m

from . import world

PROMPT = list(range(3, 60))


def test_same_prompt_under_base_and_adapters_never_shares_a_prefix(model, adapters) -> None:
    """vllm#30931, vllm#3264: the prefix cache's key had no adapter, or only its name. llama.cpp#26207: with
    another adapter for each request the KV of the one before was used again."""
    cold = {}
    for adapter in [None, *adapters]:
        fresh = world.make_engine(model)
        cold[adapter and adapter.name] = fresh.generate(PROMPT, world.GREEDY, adapter)
    assert len({tuple(tokens) for tokens in cold.values()}) == 4, "each answers in its own way"
    warm = world.make_engine(model)
    for _ in range(2):
        for adapter in [None, *adapters]:
            assert warm.generate(PROMPT, world.GREEDY, adapter) == cold[adapter and adapter.name]
    assert warm.engine.scheduler.prefixes.hits > 0


def test_a_broken_adapter_is_an_error(model, adapters, tmp_path: Path) -> None:
    local = world.make_engine(model)
    broken = m.AdapterRef("broken", 1, "sha256:0", str(tmp_path / "nothing"))
    local.add("r", PROMPT, world.GREEDY, broken)
    local.run_until(lambda: "r" in local.finished, 2000)
    assert local.finished["r"].finish_reason == "error" and local.finished["r"].error
    assert not local.tokens.get("r")
    assert local.generate(PROMPT, world.GREEDY, adapters[0])


def test_rows_that_change_hands_hold_nothing_of_their_old_owner(model, adapters) -> None:
    """sglang#8263, sglang#8103: a slot used again had weights of the adapter before it, of a larger rank."""
    roomy = world.make_engine(model)
    expected = [roomy.generate(PROMPT, world.GREEDY, adapter) for adapter in adapters]
    tight = world.make_engine(model, max_loras=1, max_cpu_loras=1)
    tight.engine.slots.max_adapters = 1
    for _ in range(2):
        for adapter, tokens in zip(adapters[::-1], expected[::-1], strict=True):
            assert tight.generate(PROMPT, world.GREEDY, adapter) == tokens
    assert tight.engine.adapters.swaps["evict"] >= 4


def test_more_adapters_than_slots_are_all_served(model, adapters) -> None:
    roomy = world.make_engine(model)
    expected = [roomy.generate(PROMPT, world.GREEDY, adapter) for adapter in adapters]
    tight = world.make_engine(model)
    tight.engine.slots.max_adapters = 1
    for index, adapter in enumerate(adapters * 3):
        tight.add(str(index), PROMPT, world.GREEDY, adapter)
    tight.run_until(lambda: len(tight.finished) == 9, 5000)
    assert [tight.tokens[str(index)] for index in range(9)] == expected * 3
