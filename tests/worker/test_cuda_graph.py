"""Graphs over buckets of tokens, their logic driven on the CPU: capturing is keeping the function, replaying
is calling it again on the same memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from coserve.core.span import SpanKind, TrainingSpan
from coserve.layers.batch import ForwardBatch
from coserve.worker import cuda_graph
from coserve.worker.cuda_graph import BucketedForward, Staging
from tests.worker.conftest import Models
from tests.worker.generation import Generation
from tests.worker.replayed import ReplayedFunctions


def generation(models: Models, graphs: ReplayedFunctions | None, **settings: int) -> Generation:
    made = Generation(models.decoder, **settings)
    if graphs is not None:
        made.runner._graphs = BucketedForward(models.decoder, made.kv, made.pool, made.slots, graphs)
    return made


def answers(made: Generation, paths: dict[str, Path]) -> dict[str, list[int]]:
    for name, path in paths.items():
        made.load(name, path)
    prompts = {"a": [5, 9, 3], "b": list(range(2, 25)), "c": [7] * 9, "d": [40, 2], "e": [3]}
    for number, (name, prompt) in enumerate(prompts.items()):
        made.add(name, prompt, adapter=(None, "all", "some")[number % 3], max_tokens=6 + number)
    return made.run()


@pytest.mark.parametrize("max_tokens", (4, 16), ids=str)
def test_decode_and_prefill_give_the_tokens_of_the_plain_pass(models: Models, max_tokens: int) -> None:
    plain = answers(generation(models, None, max_tokens=max_tokens), models.adapters)
    graphs = ReplayedFunctions()
    made = generation(models, graphs, max_tokens=max_tokens)
    assert answers(made, models.adapters) == plain
    buckets = made.runner._graphs._buckets
    assert graphs.captures == len(buckets) < graphs.plays
    assert {tokens for tokens, _, _ in buckets} <= {1, 2, 4, 8, 16}


def test_a_captured_pass_reads_standing_tensors_alone(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each bucket's batch has the same addresses at every replay."""
    seen: dict[int, set[tuple[int, ...]]] = {}
    forward = models.decoder.forward

    def watched(batch: ForwardBatch) -> torch.Tensor:
        rows = batch.inference
        tensors = [batch.token_ids_T, batch.positions_T, rows.slots_T, rows.block_tables_SB]
        tensors += [rows.query_start_S1, rows.context_lens_S]
        if batch.lora is not None:
            tensors += [batch.lora.ranks_LMS, batch.lora.segments.rows]
        key = len(batch.token_ids_T), batch.lora is not None
        seen.setdefault(key, set()).add(tuple(tensor.data_ptr() for tensor in tensors))
        return forward(batch)

    monkeypatch.setattr(models.decoder, "forward", watched)
    answers(generation(models, ReplayedFunctions(), max_tokens=8), models.adapters)
    assert seen and all(len(addresses) == 1 for addresses in seen.values())


def test_steps_that_no_bucket_takes_run_without(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = answers(generation(models, None, max_tokens=32), models.adapters)
    for name, most in (("MOST_TOKENS", 4), ("MOST_SEGMENTS", 1), ("MOST_GRAPHS", 1)):
        graphs = ReplayedFunctions()
        with monkeypatch.context() as changed:
            changed.setattr(cuda_graph, name, most)
            made = generation(models, graphs, max_tokens=32)
            assert answers(made, models.adapters) == plain
        assert graphs.captures, name
        if name == "MOST_GRAPHS":
            assert len(made.runner._graphs._buckets) == 1
        if name == "MOST_TOKENS":
            assert max(tokens for tokens, _, _ in made.runner._graphs._buckets) <= 4


def test_windows_keep_a_step_from_its_graph_unless_they_run_apart(models: Models) -> None:
    graphs = ReplayedFunctions()
    made = generation(models, graphs)
    made.add("chat", [5, 9, 3], max_tokens=2)
    plan = made.scheduler.schedule(0.0)
    window = TrainingSpan(SpanKind.TRAIN_FORWARD, sequence=None, start=0, length=4)  # type: ignore[arg-type]
    assert made.runner._graphs.forward(replace(plan, training_forward=[window])) is None
    apart = replace(plan, training_forward=[window], apart=True)
    assert made.runner.run(apart, {}).sampled.keys() == {"chat"}
    assert graphs.captures == 1


def test_staging_copies_all_tables_in_one_piece() -> None:
    shapes = {"a": ((3,), torch.int64), "b": ((2, 5), torch.int32), "c": ((1,), torch.int32)}
    staging = Staging(torch.device("cpu"), **shapes)
    for number, table in enumerate(staging.host.values(), 1):
        table.fill_(number)
    assert all(not table.any() for table in staging.device.values())
    staging.upload()
    for number, (name, (shape, dtype)) in enumerate(shapes.items(), 1):
        assert staging.device[name].dtype == dtype
        assert torch.equal(staging.device[name], torch.full(shape, number, dtype=dtype))
