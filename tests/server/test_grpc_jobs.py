"""Jobs over gRPC: settings, what is chosen, validation, and what the log and the lists carry."""

from __future__ import annotations

import json

import grpc
import pytest

from coserve.server.grpc_gen import fine_tuning_pb2 as pb
from tests.server.running import ServerThread, wait_for
from tests.server.test_grpc import DATA, Stubs, failure, stubs

__all__ = ["stubs"]  # the fixture


def test_settings_come_back_as_they_are_in_force(stubs: Stubs, server: ServerThread) -> None:
    server.engine.auto_train = False
    lora = pb.LoraConfig(
        r=4, lora_dropout=0.1, freeze_a=True, init_lora_weights="gaussian", exclude_modules=["q_proj"]
    )
    training = pb.TrainingConfig(
        optimizer="sgd", momentum=0.5, loraplus_lr_ratio=4, packing=True, kl_coef=0.2, max_length=128
    )
    job = stubs.create(
        lora=lora, training=training, method="dft", suffix="s", priority=-2, metadata={"team": "red"}
    )
    wait_for(lambda: job.id in server.engine.jobs)
    spec = server.engine.jobs[job.id]
    assert (spec.method, spec.priority) == ("dft", -2)
    assert (spec.lora.freeze_a, spec.lora.init_lora_weights) == (True, "gaussian")
    assert (spec.training.optimizer, spec.training.momentum, spec.training.kl_coef) == ("sgd", 0.5, 0.2)
    for given, shown in ((lora, job.lora), (training, job.training)):
        for field, value in given.ListFields():
            assert getattr(shown, field.name) == value, field.name
    assert (job.method, job.suffix, job.priority) == ("dft", "s", -2)
    again = stubs.create(lora=job.lora, training=job.training, method="dft")
    assert again.training == job.training and again.lora == job.lora
    for team, found in (("red", [job.id]), ("blue", [])):
        listed = stubs.tuning.ListJobs(pb.ListJobsRequest(metadata={"team": team}))
        assert [one.id for one in listed.jobs] == found


def test_what_is_left_to_the_server(stubs: Stubs, server: ServerThread) -> None:
    server.engine.auto_train = False
    auto = ["n_epochs", "batch_size", "learning_rate_multiplier"]
    made = stubs.create(training=pb.TrainingConfig(auto=auto))
    assert list(made.training.auto) == auto
    assert not made.training.HasField("n_epochs") and not made.training.HasField("learning_rate")
    wait_for(lambda: made.id in server.engine.jobs)
    training = stubs.tuning.GetJob(pb.GetJobRequest(job_id=made.id)).training
    assert not training.auto
    assert (training.n_epochs, training.batch_size, training.learning_rate) == (8, 1, 1e-4)
    with pytest.raises(grpc.RpcError) as refused:
        stubs.create(training=pb.TrainingConfig(auto=["seed"]))
    assert "training.auto" in refused.value.details()


def test_validation_is_in_the_log_and_the_job(stubs: Stubs) -> None:
    job = stubs.create(validation_file=stubs.upload(DATA[: DATA.index(b"\n")]))
    events = stubs.watch(job.id)
    steps = [event for event in events if event.type == "metrics"]
    assert [event.HasField("valid_loss") for event in steps] == [True, False, False]
    assert (steps[0].valid_loss, steps[0].valid_accuracy, steps[0].accuracy) == (3.0, 0.125, 0.25)
    assert (steps[0].seconds, steps[0].trained_tokens) == (0.5, 10)
    done = stubs.tuning.GetJob(pb.GetJobRequest(job_id=job.id))
    assert done.validation_file == job.validation_file and done.valid_loss == 3.0
    assert done.loss == pytest.approx(2 / 3) and done.epoch == 1.0
    (checkpoint,) = stubs.tuning.ListCheckpoints(pb.ListCheckpointsRequest(job_id=job.id)).checkpoints
    assert checkpoint.accuracy == 0.75 and not checkpoint.HasField("valid_loss")


def test_a_preference_job_wants_preferences(stubs: Stubs, server: ServerThread) -> None:
    server.engine.auto_train = False
    rows = [{"prompt": f"{i} + 1 =", "chosen": f" {i + 1}", "rejected": " no"} for i in range(12)]
    data = "\n".join(map(json.dumps, rows)).encode()
    training = pb.TrainingConfig(beta=0.4)
    job = stubs.create(method="dpo", training=training, training_file=stubs.upload(data))
    wait_for(lambda: job.id in server.engine.jobs)
    assert server.engine.jobs[job.id].training.beta == 0.4 and job.training.beta == 0.4
    last = stubs.watch(stubs.create(method="dpo", training=training).id)[-1]
    assert last.status == "failed" and "dpo" in last.message
    request = pb.CreateJobRequest(training_file=job.training_file, training=training)
    code, _, param = failure(stubs.tuning.CreateJob, request)
    assert code is grpc.StatusCode.INVALID_ARGUMENT and param == "training.beta"
