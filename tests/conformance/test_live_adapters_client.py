"""`JOB:live` through OpenAI's client, against a real server that trains meanwhile."""

from __future__ import annotations

import openai

from tests.faults.served import Served

QUESTION = "What is 3 + 4?"


def ask(client: openai.OpenAI, model: str) -> tuple[str, str | None]:
    """(greedy answer, system_fingerprint)."""
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": QUESTION}], temperature=0, max_tokens=24
    )
    return str(answer.choices[0].message.content), answer.system_fingerprint


def step_of(client: openai.OpenAI, job_id: str) -> int:
    job = client.fine_tuning.jobs.retrieve(job_id)
    return int(job.progress["step"])  # type: ignore[attr-defined]


def test_the_adapter_in_training_answers_as_its_checkpoint_does(
    client: openai.OpenAI, served: Served
) -> None:
    job_id = served.start_job(training={"n_epochs": 300, "learning_rate": 5e-4, "checkpoint_steps": 1000})
    live = f"{job_id}:live"
    served.wait(lambda: step_of(client, job_id) >= 2)
    first, fingerprint = ask(client, live)
    assert first and fingerprint is not None
    step = int(fingerprint.removeprefix(f"{live}@"))
    assert step >= 2
    served.wait(lambda: step_of(client, job_id) >= step + 40)
    later = ask(client, live)[1]
    assert int(str(later).removeprefix(f"{live}@")) > step

    client.fine_tuning.jobs.pause(job_id)
    checkpoint = client.fine_tuning.jobs.checkpoints.list(job_id).data[0]
    answer, fingerprint = ask(client, live)
    assert fingerprint == f"{live}@{checkpoint.step_number}"
    assert "captain" in answer and answer == ask(client, checkpoint.id)[0]
    client.fine_tuning.jobs.cancel(job_id)
    metrics = served.http.get("/metrics").text
    assert f"{live}@" not in metrics
