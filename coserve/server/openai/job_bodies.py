"""OpenAI's objects of the fine-tuning API: its request in our words, and our records in its."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from coserve.errors import InvalidRequest
from coserve.models.config import ModelConfig
from coserve.server.application.job_changes import checkpoint_names
from coserve.server.application.training_request import AUTO, DEFAULTS
from coserve.server.fields import Fields
from coserve.server.job_store import CheckpointRow, JobEvent, JobRecord
from coserve.training.lora_settings import peft_config

_HYPERPARAMETERS = {"dpo": frozenset({*AUTO, "beta"})}
_ANY_METHOD = frozenset(AUTO)


def plain_request(fields: Fields) -> dict[str, Any]:
    """OpenAI's body in the words of CreateJobRequest: method and hyperparameters brought into place."""
    body = dict(fields.body)
    if body.pop("integrations", None):
        raise fields.fail(
            "integrations", "is not supported: this server sends nothing elsewhere; watch the job's events."
        )
    given = [_hyperparameters(fields.object("hyperparameters"), _ANY_METHOD)]
    body.pop("hyperparameters", None)
    if isinstance(body.get("method"), Mapping):
        method = Fields(body["method"], "method.")
        kind = method.string("type", "supervised") or "supervised"
        method.only(frozenset({"type", kind}), "method")
        body["method"] = kind
        settings = method.object(kind)
        if settings is not None:
            settings.only(frozenset({"hyperparameters"}), f"method.{kind}")
            known = _HYPERPARAMETERS.get(kind, _ANY_METHOD)
            given.append(_hyperparameters(settings.object("hyperparameters"), known))
    training = fields.object("training")
    given.append(dict(training.body) if training is not None else {})
    merged = _merged(given)
    if merged:
        body["training"] = merged
    return {name: value for name, value in body.items() if value is not None}


def _hyperparameters(fields: Fields | None, known: frozenset[str]) -> dict[str, Any]:
    if fields is None:
        return {}
    fields.only(known, "hyperparameters")
    return {name: value for name, value in fields.body.items() if value is not None}


def _merged(given: list[dict[str, Any]]) -> dict[str, Any]:
    """One `training` of all places that may say something about it; "auto" becomes a name in `auto`."""
    merged: dict[str, Any] = {}
    for settings in given:
        for name, value in settings.items():
            if merged.get(name, value) != value:
                raise InvalidRequest(
                    f"training.{name} contradicts the hyperparameters.", param=f"training.{name}"
                )
            merged[name] = value
    left = [name for name, value in merged.items() if value == "auto" and name != "auto"]
    for name in left:
        if name in (*AUTO, "beta"):
            del merged[name]
    auto = [name for name in left if name in AUTO]
    if auto and isinstance(merged.get("auto", []), list):
        merged["auto"] = [*merged.get("auto", []), *auto]
    return merged


def hyperparameters(job: JobRecord) -> dict[str, Any]:
    """Those in force; "auto" for those that wait for the data to be read."""
    values: dict[str, Any] = {
        "n_epochs": job.training.n_epochs,
        "batch_size": job.training.batch_size,
        "learning_rate_multiplier": job.training.learning_rate / DEFAULTS.learning_rate,
    }
    values |= dict.fromkeys(job.auto, "auto")
    return values | ({"beta": job.training.beta} if job.method == "dpo" else {})


def job_body(job: JobRecord, model: ModelConfig) -> dict[str, Any]:
    """OpenAI's job object with our additions."""
    error = job.error
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": job.created_at,
        "started_at": job.started_at,
        "finished_at": job.finished_at,
        "estimated_finish": job.estimated_finish,
        "model": job.model,
        "fine_tuned_model": job.fine_tuned_model,
        "organization_id": "coserve",
        "status": job.status,
        "status_reason": job.status_reason or None,
        "error": {"code": error.code, "message": error.message, "param": error.param} if error else None,
        "hyperparameters": hyperparameters(job),
        "method": {"type": job.method, job.method: {"hyperparameters": hyperparameters(job)}},
        "training_file": job.training_file,
        "validation_file": job.validation_file or None,
        "result_files": job.result_files,
        "trained_tokens": job.trained_tokens,
        "seed": job.seed,
        "integrations": [],
        "metadata": job.metadata,
        "adapter": job.adapter or None,
        "suffix": job.suffix or None,
        "init_from": job.init_from or None,
        "priority": job.priority,
        "publish_if": msgspec.to_builtins(job.publish_if) if job.publish_if is not None else None,
        "check_results": msgspec.to_builtins(job.check_results),
        "progress": {
            "step": job.step,
            "total_steps": job.total_steps,
            "epoch": job.epoch,
            "tokens_per_second": job.tokens_per_second,
            "share": job.share,
            "train_loss": job.loss,
            "valid_loss": job.valid_loss,
        },
        "peft": peft_config(job.lora, model, job.model),
        "lora": {name: getattr(job.lora, name) for name in job.lora.__struct_fields__},
        "training": {name: getattr(job.training, name) for name in job.training.__struct_fields__},
    }


def metric_values(event: JobEvent) -> dict[str, float]:
    """A step's losses and accuracies under OpenAI's names; absent where none were measured.

    The whole validation set is evaluated each time, so `valid_*` and `full_valid_*` are the same numbers.
    """
    values = {
        "train_loss": event.loss,
        "train_mean_token_accuracy": event.accuracy,
        "valid_loss": event.valid_loss,
        "valid_mean_token_accuracy": event.valid_accuracy,
        "full_valid_loss": event.valid_loss,
        "full_valid_mean_token_accuracy": event.valid_accuracy,
    }
    return {name: value for name, value in values.items() if value is not None}


def event_body(event: JobEvent) -> dict[str, Any]:
    """OpenAI's event object: status and checkpoint events are messages here."""
    data: dict[str, Any] = {}
    if event.type == "metrics":
        data = {
            "step": event.step,
            "total_steps": event.total_steps,
            **metric_values(event),
            "epoch": event.epoch,
            "learning_rate": event.learning_rate,
            "grad_norm": event.grad_norm,
            "trained_tokens": event.trained_tokens,
            "tokens_per_second": event.tokens_per_second,
            "share": event.share,
            "seconds": event.seconds,
        }
    return {
        "id": event.id,
        "object": "fine_tuning.job.event",
        "created_at": event.created_at,
        "level": event.level,
        "message": event.message,
        "type": "metrics" if event.type == "metrics" else "message",
        "data": data,
    }


def checkpoint_body(job: JobRecord, checkpoint: CheckpointRow, step: JobEvent | None) -> dict[str, Any]:
    """OpenAI's checkpoint object; `step` is the metrics event of its optimizer step."""
    _, name = checkpoint_names(job, checkpoint)
    metrics = {"train_loss": checkpoint.train_loss} | (metric_values(step) if step else {})
    return {
        "id": checkpoint.id,
        "object": "fine_tuning.job.checkpoint",
        "created_at": checkpoint.created_at,
        "fine_tuned_model_checkpoint": name,
        "fine_tuning_job_id": checkpoint.job_id,
        "step_number": checkpoint.step,
        "metrics": {"step": checkpoint.step, **metrics},
    }
