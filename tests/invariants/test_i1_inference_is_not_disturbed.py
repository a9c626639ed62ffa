"""I1: a request's greedy output is the same whatever trains beside it and whatever shares its batch."""

from __future__ import annotations

from . import world

PROMPTS = [[5, 9, 3, 40], list(range(2, 60)), [7] * 21, [90, 2, 33, 8, 61, 12]]


def test_training_beside_it_changes_no_token(model, data, adapters, tmp_path) -> None:
    alone = world.make_engine(model)
    sampling = world.SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True, logprobs=1)
    expected = [alone.generate(prompt, sampling) for prompt in PROMPTS]
    tuned = alone.generate(PROMPTS[0], sampling, adapters[1])
    busy = world.make_engine(model)
    world.submit(busy, world.make_job(data, tmp_path, n_epochs=1000))
    for wave in range(100):
        names = [f"{wave}/{index}" for index in range(len(PROMPTS) + 1)]
        for name, prompt in zip(names, PROMPTS, strict=False):
            busy.add(name, prompt, sampling)
        busy.add(names[-1], PROMPTS[0], sampling, adapters[1])
        busy.run_until(lambda names=names: all(name in busy.finished for name in names), 5000)
        assert [busy.tokens[name] for name in names] == [*expected, tuned]
        if len(world.progress(busy, "ftjob-1")) >= 2:
            return
    raise AssertionError("no optimizer step was done beside the requests")


def test_batch_mates_and_chunks_change_no_token(model, adapters) -> None:
    alone = world.make_engine(model, enable_prefix_caching=False)
    expected = [alone.generate(prompt, world.GREEDY, adapters[1]) for prompt in PROMPTS]
    crowd = world.make_engine(model, enable_prefix_caching=False, max_num_batched_tokens=16)
    for index, prompt in enumerate(PROMPTS):
        for copy, adapter in enumerate([adapters[1], None, adapters[0], adapters[2]]):
            crowd.add(f"{index}/{copy}", prompt, world.GREEDY, adapter)
    crowd.run_until(lambda: len(crowd.finished) == 4 * len(PROMPTS), 5000)
    assert [crowd.tokens[f"{index}/0"] for index in range(len(PROMPTS))] == expected


def test_preemption_changes_no_token(model) -> None:
    roomy = world.make_engine(model)
    sampling = world.SamplingParams(max_tokens=100, temperature=0.7, seed=5, ignore_eos=True)
    expected = [roomy.generate(prompt, sampling) for prompt in PROMPTS]
    slab = roomy.engine.kv.slab_bytes
    tight = world.make_engine(model, max_model_len=192, kv_cache_memory_bytes=12 * slab)
    for index, prompt in enumerate(PROMPTS):
        tight.add(str(index), prompt, sampling)
    tight.run_until(lambda: len(tight.finished) == len(PROMPTS), 5000)
    assert tight.engine.scheduler.num_preemptions > 0
    assert [tight.tokens[str(index)] for index in range(len(PROMPTS))] == expected
