"""An adapter is published only if it meets its job's `publish_if`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from coserve.errors import QueueFull
from coserve.server.application import publish_checks
from coserve.server.grpc_gen import fine_tuning_pb2
from tests.server.fake_engine import DEFAULT_REPLY
from tests.server.running import BASE, ServerThread, wait_for
from tests.server.test_fine_tuning_http import DATA, until_over
from tests.server.test_grpc import Stubs


def questions(*answers: str) -> bytes:
    rows = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": answer}]}
        for i, answer in enumerate(answers)
    ]
    return "\n".join(json.dumps(row) for row in rows).encode()


def upload(client: openai.OpenAI, data: bytes = DATA) -> str:
    return client.files.create(file=("t.jsonl", data), purpose="fine-tune").id


def create(client: openai.OpenAI, gate: Any, adapter: str, **more: Any) -> Any:
    extra = {"adapter": adapter, "publish_if": gate, **more}
    return client.fine_tuning.jobs.create(model=BASE, training_file=upload(client), extra_body=extra)


def names(client: openai.OpenAI) -> list[str]:
    return [card.id for card in client.models.list()]


# The stand-in engine's validation loss is 3, its accuracy 0.125.
@pytest.mark.parametrize(
    ("gate", "missed"),
    [
        ({"max_valid_loss": 3.0}, None),
        ({"max_valid_loss": 2.9}, "max_valid_loss"),
        ({"min_valid_accuracy": 0.125}, None),
        ({"min_valid_accuracy": 0.5, "max_valid_loss": 9}, "min_valid_accuracy"),
        ({}, None),
    ],
)
def test_losses(server: ServerThread, gate: dict[str, Any], missed: str | None) -> None:
    client, adapter = server.openai(), f"loss{abs(hash(str(gate)))}"
    job = create(client, gate, adapter, training={"validation_split": 0.5})
    done = until_over(client, job.id)
    assert (adapter in names(client)) == (missed is None) == (done.status == "succeeded")
    if missed is not None:
        assert (done.error.code, done.error.param) == ("publish_gate_failed", f"publish_if.{missed}")
        assert "3" in done.error.message or "0.125" in done.error.message
        checkpoint = client.fine_tuning.jobs.checkpoints.list(job.id).data[0]
        said = client.chat.completions.create(
            model=checkpoint.id, messages=[{"role": "user", "content": "Hi"}]
        )
        assert said.choices[0].message.content == DEFAULT_REPLY


def test_checks_ask_the_adapter_that_would_be_published(server: ServerThread) -> None:
    client = server.openai()
    half = upload(client, questions(DEFAULT_REPLY, "no"))
    part = upload(client, questions(DEFAULT_REPLY[:4]))
    checks = [
        {"name": "half", "file": half, "min_score": 0.5, "max_tokens": 100},
        {"name": "part", "file": part, "match": "contains", "max_tokens": 50},
    ]
    job = create(client, {"checks": checks}, "checked")
    client.files.delete(half)
    done = until_over(client, job.id)
    assert done.status == "succeeded" and "checked" in names(client)
    assert done.check_results == [
        {"name": "half", "score": 0.5, "questions": 2},
        {"name": "part", "score": 1.0, "questions": 1},
    ]
    asked = server.engine.requests
    digest = next(card for card in client.models.list() if card.id == "checked").digest
    assert len(asked) == 3 and {add.adapter.digest for add in asked} == {digest}
    assert {(add.sampling.temperature, add.sampling.max_tokens) for add in asked} == {(0.0, 100), (0.0, 50)}
    said = [event.message for event in client.fine_tuning.jobs.list_events(job.id).data]
    assert "Check 'half': 0.5 of 2 right" in said

    checks[0]["file"], checks[0]["min_score"] = upload(client, questions(DEFAULT_REPLY, "no")), 0.6
    failed = until_over(client, create(client, {"checks": checks}, "unchecked").id)
    assert (failed.status, failed.error.param) == ("failed", "publish_if.checks[0].min_score")
    assert "'half'" in failed.error.message and "unchecked" not in names(client)


def test_a_job_being_checked_can_be_cancelled_not_paused(server: ServerThread) -> None:
    client, engine = server.openai(), server.engine
    engine.refusal = QueueFull("full", retry_after=30.0)
    check = {"name": "c", "file": upload(client, questions(DEFAULT_REPLY)), "max_tokens": 100}
    job = create(client, {"checks": [check]}, "never")
    wait_for(lambda: server.server.context.jobs.reports.is_checking(job.id))
    with pytest.raises(openai.BadRequestError, match="being checked"):
        client.fine_tuning.jobs.pause(job.id)
    engine.refusal = None
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    assert until_over(client, job.id).status == "cancelled" and "never" not in names(client)


def test_refusals(server: ServerThread, http: httpx.Client) -> None:
    client = server.openai()
    file, good = upload(client), upload(client, questions("a"))
    check = {"name": "c", "file": good, "max_tokens": 100}
    for gate, param in (
        (5, "publish_if"),
        ({"loss": 1}, "publish_if.loss"),
        ({"max_valid_loss": 1}, "publish_if.max_valid_loss"),
        ({"checks": [{**check, "match": "fuzzy"}]}, "publish_if.checks[0].match"),
        ({"checks": [{**check, "min_score": 2}]}, "publish_if.checks[0].min_score"),
        ({"checks": [{"file": good}]}, "publish_if.checks[0].name"),
        ({"checks": [check, check]}, "publish_if.checks"),
        ({"checks": [{**check, "file": "file-none"}]}, "publish_if.checks[0].file"),
        ({"checks": [{**check, "file": upload(client, b'{"text": "x"}')}]}, "publish_if.checks[0].file"),
        ({"checks": [{**check, "file": upload(client, b"{")}]}, "publish_if.checks[0].file"),
        ({"checks": [{**check, "max_tokens": 4000}]}, "publish_if.checks[0].file"),
    ):
        body = {"model": BASE, "training_file": file, "publish_if": gate}
        refused = http.post("/v1/fine_tuning/jobs", json=body)
        assert refused.status_code in (400, 404), (gate, refused.text)
        assert refused.json()["error"]["param"] == param, refused.text


def test_a_file_deleted_while_the_job_is_made(
    server: ServerThread, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = server.openai()
    file = upload(client, questions("a"))
    check = {"name": "c", "file": file, "max_tokens": 9}

    def gone(source: Path, kept: Path) -> None:
        raise FileNotFoundError(source)

    monkeypatch.setattr(publish_checks, "_keep", gone)
    body = {"model": BASE, "training_file": upload(client), "publish_if": {"checks": [check]}}
    refused = http.post("/v1/fine_tuning/jobs", json=body)
    assert refused.status_code == 404 and "is gone" in refused.json()["error"]["message"]


def test_over_grpc(server: ServerThread) -> None:
    with server.channel() as channel:
        stubs = Stubs(channel)
        check = fine_tuning_pb2.PublishCheck(
            name="c", file=stubs.upload(questions("no")), min_score=0.0, max_tokens=9
        )
        job = stubs.create(adapter="g", publish_if=fine_tuning_pb2.PublishGate(checks=[check]))
        assert job.publish_if.checks[0].min_score == 0.0 and not job.publish_if.HasField("max_valid_loss")
        assert stubs.watch(job.id)[-1].status == "succeeded"
        done = stubs.tuning.GetJob(fine_tuning_pb2.GetJobRequest(job_id=job.id))
        assert (done.check_results[0].name, done.check_results[0].score) == ("c", 0.0)
