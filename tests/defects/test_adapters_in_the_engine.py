"""Upstream defects of adapters, held against the engine itself."""

from __future__ import annotations

import itertools

import pytest

from coserve.core import adapter_turns
from coserve.core.block_pool import BlockPool
from coserve.core.prefix_cache import PrefixCache
from coserve.core.request import Request
from coserve.core.request_prefixes import RequestPrefixes
from coserve.core.sampling_params import SamplingParams
from coserve.engine import messages as m
from tests.invariants import world

PROMPT = list(range(3, 60))
LONG = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)


def test_every_block_is_known_by_its_adapter() -> None:
    """vllm#44250: KV that was moved away came back by a key without the adapter. Here a block has one key,
    whoever looks for it, and the adapter is in each of a chain."""
    prefixes = RequestPrefixes(BlockPool(16, PrefixCache()), block_size=16)
    chains = []
    for place, adapter in enumerate((None, "sha256:a", "sha256:b")):
        request = Request(
            str(adapter), [7] * 64, SamplingParams(max_tokens=1), adapter=adapter, max_model_len=128
        )
        request.cursor = 64
        request.block_table = list(range(4 * place, 4 * place + 4))
        prefixes.remember(request, 0)
        chains.append(set(request.block_hashes))
    assert [len(chain) for chain in chains] == [4, 4, 4]
    assert all(not a & b for a, b in itertools.combinations(chains, 2))


def test_unload_frees_both_tiers_and_a_reload_is_there_once(model, adapters) -> None:
    """vllm#54839: an unloaded adapter kept its rows and its copy, and a reload made another of each."""
    local = world.make_engine(model)
    engine, adapter = local.engine, adapters[2]
    before = (len(engine.slots), engine.slots.rows_in_use, engine.adapters.host_bytes)
    held = []
    for _ in range(3):
        reply = local.call(lambda i: m.LoadAdapter(call_id=i, adapter=adapter))
        assert reply.error is None
        local.generate(PROMPT, world.GREEDY, adapter)
        held.append((len(engine.slots), engine.slots.rows_in_use, engine.adapters.host_bytes))
        assert local.call(lambda i: m.UnloadAdapter(call_id=i, digest=adapter.digest)).error is None
        after = (len(engine.slots), engine.slots.rows_in_use, engine.adapters.host_bytes)
        assert after == before and adapter.digest not in engine.adapters.tiers()
    assert set(held) == {(before[0] + 1, before[1] + 8, held[0][2])}


def test_base_and_more_adapters_than_rows_are_all_served(model, adapters) -> None:
    """sglang#23141: with N adapters and the base under a cap of N an assertion ended the scheduler."""
    kinds = [None, *adapters]
    expected = [world.make_engine(model).generate(PROMPT, world.GREEDY, kind) for kind in kinds]
    local = world.make_engine(model)
    local.engine.slots.max_adapters = len(adapters) - 1
    for index, kind in enumerate(kinds * 3):
        local.add(str(index), PROMPT, world.GREEDY, kind)
    local.run_until(lambda: len(local.finished) == len(kinds) * 3, 5000)
    assert [local.tokens[str(index)] for index in range(len(kinds) * 3)] == expected * 3


def test_a_long_queue_for_one_adapter_keeps_nobody_out_for_ever(model, adapters, monkeypatch) -> None:
    """sglang#15129: another adapter waited for as long as requests for a busy one came. vllm#15422: who
    waited for an adapter's room kept the base and the adapters on the device waiting too."""
    local = world.make_engine(model, max_num_seqs=4)
    local.engine.slots.max_adapters = 1
    scheduler, count = local.engine.scheduler, itertools.count()

    def busy(name: str) -> None:
        """Steps with seven requests in hand, none of which ends with another, until `name` has its answer."""
        for _ in range(2000):
            while len(scheduler.running) + len(scheduler.waiting) < 7:
                n = next(count)
                length = SamplingParams(max_tokens=12 + 5 * (n % 4), temperature=0.0, ignore_eos=True)
                local.add(f"a{n}", [3, 4, 5, 6 + n % 50], length, adapters[0])
            local.step()
            if name in local.finished:
                return
        raise AssertionError(f"{name} waits for ever")

    monkeypatch.setattr(adapter_turns, "DRAIN_AFTER", 1e9)
    busy("a0")
    local.add("other", PROMPT, world.GREEDY, adapters[1])
    local.add("base", PROMPT, world.GREEDY)
    busy("base")
    busy(f"a{next(count) - 1}")
    assert "other" not in local.finished, "nobody has made room so far"
    monkeypatch.setattr(adapter_turns, "DRAIN_AFTER", 0.0)
    busy("other")
    expected = world.make_engine(model).generate(PROMPT, world.GREEDY, adapters[1])
    assert local.tokens["other"] == expected


def test_an_abort_ends_each_request_of_an_adapter(model, adapters) -> None:
    """sglang#29179: aborted requests of adapters were never answered. Running, waiting for a place, and
    waiting for weights: each gets its last output, and holds nothing."""
    local = world.make_engine(model, max_num_seqs=2)
    names = ["run-1", "run-2", "wait", "load"]
    for name, adapter in zip(names, (*adapters[:1] * 3, adapters[1]), strict=True):
        local.add(name, PROMPT, LONG, adapter)
    local.run_until(lambda: bool(local.tokens.get("run-1")), 2000)
    local.engine.handle(m.AbortRequests(request_ids=names))
    assert {name: local.finished[name].finish_reason for name in names} == dict.fromkeys(names, "abort")
    assert not local.engine.scheduler.has_requests
    assert local.engine.blocks.num_kv_blocks == 0, "before the next step"
    assert not any(local.engine.slots.acquire(key).readers > 1 for key in local.engine.slots.keys)


@pytest.mark.parametrize("adapted", [False, True])
def test_whoever_comes_after_an_abort_gets_their_own_answer(model, adapters, adapted: bool) -> None:
    """sglang#36552: the next request after a disconnect read what the aborted one had left half done."""
    adapter = adapters[2] if adapted else None
    expected = world.make_engine(model).generate(PROMPT, LONG, adapter)
    local = world.make_engine(model, max_num_batched_tokens=16)
    for steps in (1, 2, 5, 9):  # in the middle of the prompt, at its end, in the answer
        local.add(f"gone-{steps}", PROMPT, LONG, adapter)
        for _ in range(steps):
            local.step()
        local.engine.handle(m.AbortRequests(request_ids=[f"gone-{steps}"]))
        assert local.engine.blocks.num_kv_blocks == 0
        assert local.generate(PROMPT, LONG, adapter) == expected
