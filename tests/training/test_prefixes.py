"""Examples that begin alike share their prefix: who does, and loss and gradients as without."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import takewhile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from coserve.engine import messages as m
from coserve.models.decoder import Decoder
from coserve.models.loader import load_model
from coserve.training import evaluation, running_job
from coserve.training.batching import BatchPlan
from coserve.training.dataset import TokenDataset
from coserve.training.job import LoraSpec, StepMetrics, TrainingSpec
from coserve.training.microbatch import LoraDropout, Microbatch, Sample
from coserve.training.prefixes import LEAST, SharedRun, groups, longest_sharer
from coserve.training.trainable_adapter import TrainableAdapter
from tests.invariants import world
from tests.parity.harness import make_reference, save_reference
from tests.parity.training_harness import Trainer, fill_b, gradient_tensors

VOCAB = 97
EXACT = 2e-5  # of a tensor's largest gradient: both runs' rounding in fp32


def make_data(seed: int, prefixes: list[int], owns: list[tuple[int, int]]) -> list[Sample]:
    """Samples of a prefix of `prefixes[which]` tokens and so many of their own, for each (which, own); the
    first two own tokens carry no loss."""
    generator = torch.Generator().manual_seed(seed)
    heads = [torch.randint(2, VOCAB, (length,), generator=generator).tolist() for length in prefixes]
    samples: list[Sample] = []
    for which, own in owns:
        tail = torch.randint(2, VOCAB, (own,), generator=generator).tolist()
        ids = heads[which] + tail
        samples.append((ids, [-100] * (len(ids) - own + 2) + tail[2:]))
    return samples


def dataset(samples: list[Sample], pairs: bool = False) -> TokenDataset:
    tokens, labels = (np.concatenate([np.asarray(s[i], dtype=np.int32) for s in samples]) for i in (0, 1))
    offsets = np.cumsum([0, *(len(ids) for ids, *_ in samples)])
    return TokenDataset(tokens, labels, offsets, pairs)


LAYOUTS = st.tuples(
    st.integers(0, 1 << 20),
    st.lists(st.integers(0, 70), min_size=1, max_size=3),
    st.lists(st.tuples(st.integers(0, 2), st.integers(3, 60)), min_size=1, max_size=16),
).map(lambda drawn: make_data(drawn[0], drawn[1], [(w % len(drawn[1]), own) for w, own in drawn[2]]))


@given(LAYOUTS, st.booleans(), st.sampled_from([64, 200, 1024]))
def test_a_step_holds_every_example_once_and_computes_no_more_than_unshared(
    samples: list[Sample], pairs: bool, limit: int
) -> None:
    samples = samples[: len(samples) // 2 * 2] if pairs else samples
    if not samples:
        return
    data, spec = dataset(samples, pairs), TrainingSpec(batch_size=99)
    plan = BatchPlan(data, spec, 3, microbatch_tokens=limit, longest_sharer=512)
    batch, plain = plan.step(1), BatchPlan(data, spec, 3, microbatch_tokens=limit).step(1)
    assert sorted(batch.examples) == list(range(len(samples)))
    assert (batch.tokens, batch.trained_tokens) == (plain.tokens, plain.trained_tokens)
    sizes = []
    for examples, runs in zip(batch.microbatches, batch.shared, strict=True):
        microbatch = Microbatch([samples[i] for i in examples], shared=runs)  # refuses what isn't shared
        sizes.append(microbatch.num_tokens)
        assert all(run.tokens == 0 or run.tokens >= LEAST for run in runs)
        assert microbatch.num_trained == sum(data.trained_tokens(i) for i in examples)
        if pairs:
            assert all(a % 2 == 0 and b == a + 1 for a, b in zip(examples[::2], examples[1::2], strict=True))
    assert sum(sizes) == batch.tokens - batch.shared_tokens
    assert max(sizes) <= max(limit, plan.longest)
    if batch.shared_tokens == 0:
        assert batch.microbatches == plain.microbatches


@given(st.lists(st.lists(st.sampled_from([0, 1]), max_size=4), min_size=1, max_size=7), st.integers(1, 2))
def test_no_other_cut_of_the_sorted_units_saves_more(branches: list[list[int]], examples: int) -> None:
    """Prefixes as paths in a tree, each edge of sixteen tokens."""
    paths = [tuple(path) for path in branches]
    heads = {i: np.repeat(np.asarray(path, dtype=np.int32), 16) for i, path in enumerate(paths)}

    def saves(members: Sequence[tuple[int, ...]]) -> int:
        common = takewhile(lambda steps: len(set(steps)) == 1, zip(*members, strict=False))
        return 16 * len(list(common)) * (len(members) * examples - 1)

    @cache
    def best(rest: tuple[tuple[int, ...], ...]) -> int:
        cuts = range(1, len(rest) + 1)
        return max((saves(rest[:cut]) + best(rest[cut:]) for cut in cuts), default=0)

    chosen = groups(heads, examples)
    assert sorted(unit for members, _ in chosen for unit in members) == sorted(heads)
    assert all(saves([paths[i] for i in m]) == tokens * (len(m) * examples - 1) for m, tokens in chosen)
    assert sum(saves([paths[i] for i in m]) for m, _ in chosen) == best(tuple(sorted(paths)))


def test_a_long_system_prompt_is_not_computed_for_each_example() -> None:
    samples = make_data(1, [800], [(0, 60)] * 7 + [(0, 900)])
    batch = BatchPlan(dataset(samples), TrainingSpec(), 3, longest_sharer=4096).step(1)
    assert [len(examples) for examples in batch.microbatches] == [7, 1]
    assert batch.shared_tokens == 6 * 800


def test_nothing_trained_is_shared() -> None:
    ids = list(range(2, 42))
    samples = [(ids, [-100] * 20 + ids[20:])] * 3  # the same example: alike to its end
    batch = BatchPlan(dataset(samples), TrainingSpec(), 3, longest_sharer=512).step(1)
    assert batch.shared == ((SharedRun(3, 19),),)
    with pytest.raises(ValueError, match="targets"):
        Microbatch(samples, shared=[SharedRun(3, 20)])
    with pytest.raises(ValueError, match="begin with the same"):
        Microbatch([samples[0], (ids[::-1], [-100] * 39 + [2])], shared=[SharedRun(2, 5)])
    with pytest.raises(ValueError, match="runs"):
        Microbatch(samples, shared=[SharedRun(2, 5)])
    with pytest.raises(ValueError, match="masks"):
        Microbatch(samples, dropout=LoraDropout(0.1, 1, 1, (0, 1, 2)), shared=[SharedRun(3, 19)])


def test_the_stream_of_a_shared_prefix() -> None:
    samples = [([5, 6, 7, 8], [-100, -100, -100, 8]), ([5, 6, 9], [-100, -100, 9])]
    alone = [([1, 2], [-100, 2])]
    microbatch = Microbatch(alone + samples, shared=[SharedRun(1, 0), SharedRun(2, 1)])
    assert microbatch.token_ids_T.tolist() == [1, 2, 5, 6, 7, 8, 6, 9]
    assert microbatch.positions_T.tolist() == [0, 1, 0, 1, 2, 3, 1, 2]
    assert microbatch.sample_start_T.tolist() == [0, 0, 2, 2, 2, 2, 2, 2]
    assert microbatch.targets_T.tolist() == [2, -100, -100, -100, 8, -100, 9, -100]
    assert microbatch.trained_starts.tolist() == [0, 1, 2, 3]
    gaps = microbatch.gaps_T2
    assert gaps is not None and gaps[6:].tolist() == [[3, 6], [3, 6]]
    assert bool((gaps[:6, 0] == gaps[:6, 1]).all())


def load(kind: str, folder: Path, **sizes: int) -> Decoder:
    return load_model(save_reference(make_reference(kind, **sizes), folder), "cpu", torch.float32)


def make_trainer(decoder: Decoder, spec: LoraSpec | None = None) -> Trainer:
    adapter = TrainableAdapter(spec or LoraSpec(r=4), decoder.config, seed=11)
    fill_b(adapter)
    return Trainer.make(decoder, adapter)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    return make_trainer(load("qwen3-mqa", tmp_path_factory.mktemp("model")))


def check_shared(trainer: Trainer, samples: list[Sample], runs: tuple[SharedRun, ...], **how) -> None:  # type: ignore[no-untyped-def]
    """Shared as in `runs`, loss and gradients are those of the samples one by one."""
    loss = trainer.gradients(samples, microbatch_tokens=1)
    plain = gradient_tensors(trainer.adapter)
    assert trainer.gradients(samples, shared=runs, **how) == pytest.approx(loss, rel=1e-6)
    for key, gradient in gradient_tensors(trainer.adapter).items():
        assert gradient.abs().max() > 0
        assert (gradient - plain[key]).abs().max() <= EXACT * plain[key].abs().max(), key


def shared_batch(samples: list[Sample]) -> tuple[list[Sample], tuple[SharedRun, ...]]:
    """All of them in one microbatch, as the plan would have it."""
    plan = BatchPlan(
        dataset(samples), TrainingSpec(batch_size=99), 3, longest_sharer=512, microbatch_tokens=1 << 20
    )
    batch = plan.step(1)
    return [samples[i] for i in batch.examples], batch.shared[0]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    LAYOUTS,
    st.sampled_from([0, 64, 128]),
    st.sampled_from([None, 0, 64, 128]),
    st.sampled_from([None, 0, 1, 2, 3, 5]),
)
def test_gradients_are_those_of_the_samples_alone(
    trainer: Trainer, samples: list[Sample], forward: int, backward: int | None, level: int | None
) -> None:
    ordered, runs = shared_batch(samples)
    check_shared(trainer, ordered, runs, forward_window=forward, backward_window=backward, level=level)


@pytest.mark.parametrize("level", [None, 0, 2, 4])
def test_windows_change_no_bit(trainer: Trainer, level: int | None) -> None:
    samples, runs = shared_batch(make_data(4, [70, 30], [(0, 40), (1, 20), (0, 90), (1, 33), (0, 25)]))
    assert runs == (SharedRun(3, 70), SharedRun(2, 30))
    loss = trainer.gradients(samples, shared=runs)
    whole = trainer.adapter.gradients.clone()
    for forward, backward, calls in ((64, 64, 1), (128, None, 1), (1, None, 3), (7, 128, 1)):
        how = {"forward_window": forward, "backward_window": backward, "calls": iter([calls] * 9999)}
        assert trainer.gradients(samples, shared=runs, level=level, **how) == loss
        assert torch.equal(trainer.adapter.gradients, whole), (forward, backward)


@pytest.mark.parametrize("kind", ["gemma2", "gemma3", "phi3", "mistral-window"])
def test_families_with_sliding_windows_share_what_is_no_longer(kind: str, tmp_path: Path) -> None:
    decoder = load(kind, tmp_path, sliding_window=80)
    longest = longest_sharer(decoder.config, 0.0)
    assert longest == 80
    samples = make_data(2, [40, 90], [(0, 40), (0, 20), (1, 30), (1, 25), (0, 33)])
    plan = BatchPlan(dataset(samples), TrainingSpec(), 3, longest_sharer=longest)
    batch = plan.step(1)
    assert sorted(run for runs in batch.shared for run in runs) == [(1, 0), (1, 0), (3, 40)]
    assert len(batch.microbatches) == 1
    check_shared(
        make_trainer(decoder), [samples[i] for i in batch.examples], batch.shared[0], forward_window=64
    )


def test_a_validation_set_shares_too(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = world.make_data(tmp_path / "data", prompt=30)

    def score(name: str) -> list[tuple[int, float, float]]:
        local, spec = (
            world.make_engine(model),
            world.make_job(data, tmp_path / name, max_steps=2, validation=data),
        )
        world.submit(local, replace(spec, lora=replace(spec.lora, lora_dropout=0.1)))  # training doesn't
        world.finish(local, spec.job_id)
        return world.validations(local, spec.job_id)

    ((_, shared, right),) = score("shared")
    monkeypatch.setattr(evaluation, "longest_sharer", lambda config, dropout: 0)
    ((_, plain, right_too),) = score("plain")
    assert shared == pytest.approx(plain, rel=1e-6) and right == right_too


def test_nobody_shares_under_dropout(trainer: Trainer) -> None:
    config = trainer.decoder.config
    assert longest_sharer(config, 0.0) == config.max_position_embeddings
    assert longest_sharer(config, 0.1) == 0


def test_a_job_shares_and_says_so(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both runs learn the same; only one computes what examples share for each."""

    def run(name: str) -> tuple[list[StepMetrics], list[str], int]:
        local, counts = world.make_engine(model), []
        take = local.engine.jobs.take_token_counts
        monkeypatch.setattr(
            local.engine.jobs, "take_token_counts", lambda: counts.append(take()) or counts[-1]
        )
        spec = world.make_job(data, tmp_path / name, n_epochs=2, batch_size=12)
        world.submit(local, spec)
        world.finish(local, spec.job_id)
        steps = [s.metrics for s in local.sent if isinstance(s, m.JobProgress)]
        local.engine.jobs.take_token_counts()
        told = [s.text for s in local.sent if isinstance(s, m.JobMessage)]
        return steps, told, sum(forward for forward, _ in counts)

    data = world.make_data(tmp_path / "data", prompt=30)
    steps, (told,), forward = run("shared")
    monkeypatch.setattr(running_job, "longest_sharer", lambda config, dropout: 0)
    plain, silence, whole = run("plain")
    first = steps[0]
    assert f"{first.tokens} tokens {first.tokens - first.shared_tokens} are computed" in told and not silence
    assert [s.tokens for s in steps] == [s.tokens for s in plain]
    assert forward == sum(s.tokens - s.shared_tokens for s in steps)
    assert whole == sum(s.tokens for s in plain)
    for ours, theirs in zip(steps, plain, strict=True):
        assert ours.shared_tokens % 30 == 0 and theirs.shared_tokens == 0
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-4)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-3)
