"""`JOB:live`: a job's adapter answers while it trains, each request from one optimizer step's weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

from coserve.core.live_snapshots import MOST_HELD
from coserve.core.step_plan import StepPlan
from coserve.engine import messages as m
from coserve.engine.local import LocalEngine
from coserve.errors import AdapterNotLive, CoserveError, Unavailable
from coserve.training.job import JobSpec
from tests.invariants import world

JOB = "ftjob-1"
PROMPT = torch.randint(2, world.VOCAB, (40,), generator=torch.Generator().manual_seed(1)).tolist()
# Sampled, so that a step's small change of the weights shows in some token.
LONG = world.SamplingParams(max_tokens=150, temperature=1.0, seed=5, ignore_eos=True)
SHORT = replace(LONG, max_tokens=8)


def make_job(data: Path, folder: Path) -> JobSpec:
    """Six optimizer steps, a checkpoint of each."""
    settings = {"learning_rate": 5e-2, "lr_scheduler_type": "constant", "checkpoint_steps": 1}
    return world.make_job(data, folder, JOB, **settings)


@pytest.fixture(scope="module")
def answers(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """What the checkpoint of each step says, served as any adapter is; at 0 what the base does."""
    local, reader = world.make_engine(model), world.make_engine(model)
    found = [reader.generate(PROMPT, LONG)]
    world.submit(local, make_job(data, tmp_path_factory.mktemp("checkpoints")))
    while len(found) < 7:
        for checkpoint in local.take(m.JobCheckpoint):
            found.append(reader.generate(PROMPT, LONG, world.ref(Path(checkpoint.path), model)))
        local.engine.step()
    assert len({tuple(answer) for answer in found}) == 7, "each step answers otherwise"
    return found


def step_of(local: LocalEngine) -> int:
    """The job's last committed step."""
    return local.engine.jobs._jobs[JOB].step


def snapshot_keys(local: LocalEngine) -> list[str]:
    """Of all snapshots that have rows, or set some aside."""
    return [key for key in local.engine.slots.keys if ":live@" in key]


def started(model: Path, data: Path, folder: Path, step: int, **settings: object) -> LocalEngine:
    """An engine with a job that has just committed `step`."""
    local = world.make_engine(model, **settings)
    world.submit(local, make_job(data, folder))
    local.run_until(lambda: step_of(local) == step, 20_000)
    return local


def is_clean(local: LocalEngine) -> bool:
    """No blocks, no cached KV, no record of a snapshot; no rows but those of a job that has succeeded."""
    engine = local.engine
    live = engine.live
    cached = engine.blocks.cache is not None and len(engine.blocks.cache)
    left = (cached, engine.blocks.num_kv_blocks, live._snapshots, live._newest, live._held)
    return set(engine.slots.keys) <= {JOB} and world.rows_are_idle(local) and not any(left)


def test_a_request_keeps_its_step_while_the_job_goes_on(model, data, tmp_path, answers) -> None:
    local = started(model, data, tmp_path, 2)
    local.add("two", PROMPT, LONG, live_job=JOB)
    local.run_until(lambda: step_of(local) == 3, 20_000)
    assert 0 < len(local.tokens["two"]) < 100, "the request is under way"
    local.add("three", PROMPT, LONG, live_job=JOB)
    local.engine.step()
    assert local.engine.slots.rows_in_use == 3 * 4, "job, step 2, and what step 3 leaves to its readers"
    world.finish(local, JOB)
    local.run_until(lambda: {"two", "three"} <= local.finished.keys(), 2000)
    assert local.tokens["two"] == answers[2]
    assert local.tokens["three"] == answers[3]
    assert is_clean(local)


@pytest.mark.parametrize("modules", [("lm_head",), ("q_proj", "down_proj", "lm_head")])
def test_adapters_on_the_head_and_of_mixed_ranks_move_whole(model, data, tmp_path, modules) -> None:
    spec = make_job(data, tmp_path)
    lora = replace(spec.lora, target_modules=modules, rank_pattern={"q_proj": 2} if modules[1:] else {})
    local, reader = world.make_engine(model), world.make_engine(model)
    world.submit(local, replace(spec, lora=lora))
    expected: dict[str, list[int]] = {}
    while world.status_of(local, JOB) != "succeeded":
        for checkpoint in local.take(m.JobCheckpoint):
            if checkpoint.step in (2, 3):
                name = f"at-{checkpoint.step}"
                local.add(name, PROMPT, LONG, live_job=JOB)
                expected[name] = reader.generate(PROMPT, LONG, world.ref(Path(checkpoint.path), model))
        local.engine.step()
        world.settle(local)  # told before the next update
    local.run_until(lambda: expected.keys() <= local.finished.keys(), 2000)
    assert {name: local.tokens[name] for name in expected} == expected
    assert expected["at-2"] != expected["at-3"] and is_clean(local)
    assert len(local.engine.pool._heads) == 1, "that of the finished job, whose rows wait for its version"


def test_reading_along_changes_no_bit_of_the_training(model, data, tmp_path) -> None:
    quiet, read = make_job(data, tmp_path / "quiet"), make_job(data, tmp_path / "read")
    for spec in (quiet, read):
        local = world.make_engine(model)
        world.submit(local, spec)
        step = 0
        while world.status_of(local, JOB) != "succeeded":
            now = step_of(local)
            if spec is read and now != step:
                step = now
                local.add(f"at-{step}", PROMPT, LONG, live_job=JOB)
            local.engine.step()
        while local.engine.scheduler.has_requests:
            local.engine.step()
        assert is_clean(local)
    assert world.same_bits(world.final_adapter(quiet), world.final_adapter(read))


def test_without_a_reader_a_step_is_written_in_place(model, data, tmp_path) -> None:
    local = started(model, data, tmp_path, 1)
    rows, placements = local.engine.slots.rows(JOB), local.engine.pool.placements
    local.add("gone", PROMPT, SHORT, live_job=JOB)
    while "gone" not in local.finished:
        local.engine.step()
        assert step_of(local) == 1, "it ends within the step that it read"
    local.run_until(lambda: step_of(local) == 2, 20_000)
    assert (local.engine.slots.rows(JOB), local.engine.pool.placements) == (rows, placements)
    assert snapshot_keys(local) == []


def test_slow_readers_hold_two_snapshots_at_most(model, data, tmp_path, answers) -> None:
    local = started(model, data, tmp_path, 1)
    said = {}
    for step in range(1, 6):
        local.run_until(lambda want=step: step_of(local) >= want, 20_000)
        name = f"at-{step}"
        local.add(name, PROMPT, replace(LONG, max_tokens=400), live_job=JOB)
        said[name] = local.engine.scheduler.get(name).adapter
        assert len(snapshot_keys(local)) <= MOST_HELD
        assert local.engine.slots.rows_in_use <= (1 + MOST_HELD) * 4
    steps = [int(key.rpartition("@")[2]) for key in said.values()]
    assert steps == [1, 2, 2, 2, 2], "the newest that is held, while an older one has readers"
    world.finish(local, JOB)
    local.run_until(lambda: said.keys() <= local.finished.keys(), 5000)
    for (name, _), step in zip(said.items(), steps, strict=True):
        assert local.tokens[name][:150] == answers[step]
    assert is_clean(local)


def test_the_next_reader_gets_the_newest_step_once_the_oldest_has_drained(model, data, tmp_path) -> None:
    local = started(model, data, tmp_path, 1)
    for step in (1, 2, 3):
        local.run_until(lambda want=step: step_of(local) == want, 20_000)
        local.add(f"at-{step}", PROMPT, LONG, live_job=JOB)
    local.engine.handle(m.AbortRequests(request_ids=["at-1"]))
    local.add("next", PROMPT, SHORT, live_job=JOB)
    assert local.engine.scheduler.get("next").adapter == f"{JOB}:live@3"
    local.run_until(lambda: {"next"} <= local.finished.keys(), 2000)


def test_a_paused_job_answers_and_caches_its_prefixes(model, data, tmp_path, answers) -> None:
    local = started(model, data, tmp_path, 2)
    assert local.call(lambda i: m.ControlJob(call_id=i, job_id=JOB, action="pause")).error is None
    for name in ("first", "again"):
        local.add(name, PROMPT, LONG, live_job=JOB)
        local.run_until(lambda want=name: want in local.finished, 2000)
        assert local.tokens[name] == answers[2]
    assert local.engine.scheduler.prefixes.hits > 0, "the second found the first one's KV"
    hits = local.engine.scheduler.prefixes.hits
    assert local.call(lambda i: m.ControlJob(call_id=i, job_id=JOB, action="resume")).error is None
    local.run_until(lambda: step_of(local) == 3, 20_000)
    assert len(local.engine.blocks.cache) == 0, "KV of a step that nobody can ask for any more"
    local.add("later", PROMPT, LONG, live_job=JOB)
    local.run_until(lambda: "later" in local.finished, 20_000)
    assert local.tokens["later"] == answers[3] and local.engine.scheduler.prefixes.hits == hits


def test_a_cancelled_job_leaves_its_rows_to_who_reads_them(model, data, tmp_path, answers) -> None:
    local = started(model, data, tmp_path, 2)
    local.add("a", PROMPT, LONG, live_job=JOB)
    for _ in range(5):
        local.engine.step()
    assert local.call(lambda i: m.ControlJob(call_id=i, job_id=JOB, action="cancel")).error is None
    local.run_until(lambda: "a" in local.finished, 2000)
    assert local.tokens["a"] == answers[2]
    assert is_clean(local)


def test_a_preempted_request_comes_back_on_its_step(model, data, tmp_path, answers) -> None:
    local = started(model, data, tmp_path, 2)
    local.add("a", PROMPT, LONG, live_job=JOB)
    for _ in range(20):
        local.engine.step()
    request = local.engine.scheduler.get("a")
    local.engine.scheduler._preempt(request, StepPlan())
    world.finish(local, JOB)
    local.run_until(lambda: "a" in local.finished, 2000)
    assert request.num_preemptions == 1 and local.tokens["a"] == answers[2]
    assert is_clean(local)


def refusal(local: LocalEngine, request_id: str) -> CoserveError:
    """The error that the server makes of a refused request, which must have had no token."""
    output = local.finished[request_id]
    assert output.error is not None and local.tokens[request_id] == []
    return output.error.to_error()


def test_without_a_step_to_read_it_is_an_error_and_never_the_base(model, data, tmp_path) -> None:
    local = world.make_engine(model)
    world.submit(local, make_job(data, tmp_path))
    local.add("early", PROMPT, SHORT, live_job=JOB)
    early = refusal(local, "early")
    assert type(early) is AdapterNotLive and early.param == "model"
    assert "first optimizer step" in early.message
    world.finish(local, JOB)
    for name, job_id in (("late", JOB), ("unknown", "ftjob-unknown")):
        local.add(name, PROMPT, SHORT, live_job=job_id)
        assert type(refusal(local, name)) is Unavailable and "not in training" in refusal(local, name).message


def test_when_all_rows_are_in_use_training_goes_on_and_the_reader_is_told(model, data, tmp_path) -> None:
    local = started(model, data, tmp_path, 1)
    slots = local.engine.slots
    others = 0
    while slots.allocate(f"other-{others}", 4) is not None:
        slots.acquire(f"other-{others}")
        others += 1
    local.add("a", PROMPT, SHORT, live_job=JOB)
    told = refusal(local, "a")
    assert isinstance(told, Unavailable) and "adapter rows" in told.message and told.retry_after > 0
    world.finish(local, JOB)


def test_a_refused_request_holds_nothing(model, data, tmp_path) -> None:
    local = started(model, data, tmp_path, 1, max_num_queued_reqs=1, max_num_seqs=1)
    for name in ("runs", "waits", "refused"):
        local.add(name, PROMPT, LONG, live_job=JOB)
        if name == "runs":
            local.engine.step()
    assert local.finished["refused"].error.code == "queue_full"
    world.finish(local, JOB)
    local.run_until(lambda: {"runs", "waits"} <= local.finished.keys(), 5000)
    assert is_clean(local)


def test_metrics_name_the_job_and_not_its_steps(model, data, tmp_path) -> None:
    local = started(model, data, tmp_path, 2)
    local.add("a", PROMPT, LONG, live_job=JOB)
    local.engine.step()
    assert local.engine.stats.snapshot(0).running_adapters == {f"{JOB}:live": 1}
