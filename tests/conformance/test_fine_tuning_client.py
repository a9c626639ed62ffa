"""OpenAI's fine-tuning API through its official client, against a real server with the demo model."""

from __future__ import annotations

import csv
import io
import json
import math
from typing import Any

import openai
import pytest
from openai.types.fine_tuning import FineTuningJob

from tests.faults.served import Served

ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"What is {i} + {i % 7}?"},
            {"role": "assistant", "content": f"Aye, captain! {i + i % 7}."},
        ]
    }
    for i in range(32)
]
DATA = "\n".join(json.dumps(row) for row in ROWS).encode()


VALID = "\n".join(json.dumps(row) for row in ROWS[::5]).encode()


def upload(client: openai.OpenAI, data: bytes = DATA) -> str:
    return client.files.create(file=("train.jsonl", data), purpose="fine-tune").id


def finished(client: openai.OpenAI, served: Served, job_id: str) -> FineTuningJob:
    served.wait(lambda: client.fine_tuning.jobs.retrieve(job_id).finished_at is not None)
    return client.fine_tuning.jobs.retrieve(job_id)


def metrics_of(client: openai.OpenAI, job_id: str) -> list[dict[str, Any]]:
    """All metrics events, oldest first, page by page."""
    events = [event for event in client.fine_tuning.jobs.list_events(job_id, limit=7)]
    return [dict(event.data) for event in events[::-1] if event.type == "metrics"]  # type: ignore[call-overload]


@pytest.fixture(scope="module")
def job(client: openai.OpenAI, served: Served) -> FineTuningJob:
    hyperparameters = {"n_epochs": 2, "batch_size": "auto", "learning_rate_multiplier": 5}
    made = client.fine_tuning.jobs.create(
        model=served.model,
        training_file=upload(client),
        validation_file=upload(client, VALID),
        suffix="mate",
        seed=11,
        metadata={"team": "blue"},
        method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},  # type: ignore[typeddict-item]
        extra_body={"lora": {"r": 4, "lora_dropout": 0.1}, "training": {"eval_steps": 5}},
    )
    assert made.status in ("validating_files", "queued", "running") and made.seed == 11
    done = finished(client, served, made.id)
    assert done.status == "succeeded", done.error
    return done


def test_a_job_reports_what_was_in_force(job: FineTuningJob) -> None:
    assert job.method is not None and job.method.supervised is not None
    in_force = job.method.supervised.hyperparameters
    assert in_force is not None and (in_force.n_epochs, in_force.batch_size) == (2, 4)
    assert in_force.learning_rate_multiplier == pytest.approx(5) and job.hyperparameters.batch_size == 4
    assert job.fine_tuned_model is not None and ":mate:" in job.fine_tuned_model
    assert job.trained_tokens and job.finished_at is not None and job.estimated_finish is None
    assert job.metadata == {"team": "blue"} and job.error is None and job.integrations == []


def test_events_and_results_tell_every_step_once(client: openai.OpenAI, job: FineTuningJob) -> None:
    metrics = metrics_of(client, job.id)
    assert [data["step"] for data in metrics] == list(range(1, 17))
    assert all(data["total_steps"] == 16 for data in metrics)
    assert metrics[-1]["train_loss"] < metrics[0]["train_loss"]
    assert all(0 <= data["train_mean_token_accuracy"] <= 1 for data in metrics)
    (file_id,) = job.result_files
    assert client.files.retrieve(file_id).purpose == "fine-tune-results"
    rows = list(csv.DictReader(io.StringIO(client.files.content(file_id).text)))
    assert [float(row["train_loss"]) for row in rows] == [data["train_loss"] for data in metrics]
    assert [float(row["train_accuracy"]) for row in rows] == [
        data["train_mean_token_accuracy"] for data in metrics
    ]
    assert [row["step"] for row in rows] == [str(step) for step in range(1, 17)]
    scored = [data for data in metrics if "valid_loss" in data]
    assert [data["step"] for data in scored] == [5, 10, 15, 16]
    assert scored[-1]["full_valid_loss"] == scored[-1]["valid_loss"] < scored[0]["valid_loss"]
    columns = [(row["valid_loss"], row["valid_mean_token_accuracy"]) for row in rows]
    assert [pair for pair in columns if pair != ("", "")] == [
        (str(data["valid_loss"]), str(data["valid_mean_token_accuracy"])) for data in scored
    ]


def test_jobs_are_listed_by_metadata(client: openai.OpenAI, job: FineTuningJob) -> None:
    found = client.fine_tuning.jobs.list(extra_query={"metadata[team]": "blue"})
    assert [listed.id for listed in found] == [job.id]
    assert list(client.fine_tuning.jobs.list(extra_query={"metadata[team]": "red"})) == []
    assert job.id in [listed.id for listed in client.fine_tuning.jobs.list(limit=1)]


def test_checkpoints_answer_by_name(client: openai.OpenAI, job: FineTuningJob) -> None:
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id, limit=1))
    steps = [checkpoint.step_number for checkpoint in checkpoints]
    assert steps == sorted(steps, reverse=True) and steps[0] == 16 and 3 <= len(steps) <= 4
    assert checkpoints[0].metrics.full_valid_loss == checkpoints[0].metrics.valid_loss is not None
    metrics = {data["step"]: data for data in metrics_of(client, job.id)}
    for checkpoint in checkpoints:
        step = metrics[checkpoint.step_number]
        assert checkpoint.metrics.train_loss == step["train_loss"]
        assert checkpoint.metrics.train_mean_token_accuracy == step["train_mean_token_accuracy"]
        answer = client.chat.completions.create(
            model=checkpoint.fine_tuned_model_checkpoint,
            messages=[{"role": "user", "content": "What is 7 + 5?"}],
            max_tokens=4,
        )
        assert answer.model == checkpoint.fine_tuned_model_checkpoint


def test_a_preference_job_begins_at_ln_2(client: openai.OpenAI, served: Served) -> None:
    """DPO from a fresh adapter: no answer is ahead of its reference, so the first loss is ln 2."""
    rows = [
        {
            "input": {"messages": [{"role": "user", "content": f"What is {i} + 2?"}]},
            "preferred_output": [{"role": "assistant", "content": f"Aye, captain! {i + 2}."}],
            "non_preferred_output": [{"role": "assistant", "content": f"{i + 2}"}],
        }
        for i in range(16)
    ]
    made = client.fine_tuning.jobs.create(
        model=served.model,
        training_file=upload(client, "\n".join(json.dumps(row) for row in rows).encode()),
        method={"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2, "n_epochs": 3, "batch_size": 8}}},
    )
    done = finished(client, served, made.id)
    assert done.status == "succeeded", done.error
    assert done.method is not None and done.method.dpo is not None
    assert done.method.dpo.hyperparameters is not None and done.method.dpo.hyperparameters.beta == 0.2
    losses = [data["train_loss"] for data in metrics_of(client, made.id)]
    assert len(losses) == 6 and losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] < losses[0]


def test_pause_resume_cancel(client: openai.OpenAI, served: Served) -> None:
    made = client.fine_tuning.jobs.create(
        model=served.model,
        training_file=upload(client),
        hyperparameters={"n_epochs": 50, "batch_size": 8},
    )
    served.wait_for_step(made.id, 2)
    assert client.fine_tuning.jobs.pause(made.id).status == "paused"  # type: ignore[comparison-overlap]
    step = served.job(made.id)["progress"]["step"]
    kept = client.fine_tuning.jobs.checkpoints.list(made.id).data[0]
    assert kept.step_number == step and served.job(made.id)["estimated_finish"] is None
    assert client.fine_tuning.jobs.resume(made.id).status == "running"
    served.wait_for_step(made.id, step + 1)
    assert client.fine_tuning.jobs.retrieve(made.id).estimated_finish is not None
    cancelled = client.fine_tuning.jobs.cancel(made.id)
    assert cancelled.status == "cancelled" and cancelled.fine_tuned_model is None
    steps = [data["step"] for data in metrics_of(client, made.id)]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > step
    with pytest.raises(openai.BadRequestError) as over:
        client.fine_tuning.jobs.resume(made.id)
    assert over.value.code == "failed_precondition"


def test_a_tuned_model_can_be_deleted(client: openai.OpenAI, served: Served, job: FineTuningJob) -> None:
    """Runs last: the model of the job is gone, the job is not."""
    assert job.fine_tuned_model is not None
    assert client.models.delete(job.fine_tuned_model).deleted
    with pytest.raises(openai.NotFoundError):
        served_by_nobody = client.chat.completions.create(
            model=job.fine_tuned_model, messages=[{"role": "user", "content": "Hi"}]
        )
        raise AssertionError(served_by_nobody)
    assert client.fine_tuning.jobs.retrieve(job.id).status == "succeeded"
