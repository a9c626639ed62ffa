"""/v1/fine_tuning/jobs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from coserve.errors import InvalidRequest
from coserve.server.application.job_changes import checkpoint_names
from coserve.server.application.job_request import peft_config
from coserve.server.auth import TUNE
from coserve.server.context import Context
from coserve.server.fields import Fields
from coserve.server.http import Route, json_response, read_json
from coserve.server.job_store import CheckpointRow, JobEvent, JobRecord
from coserve.server.openai.paging import list_body, query_limit

_HYPERPARAMETERS = frozenset({"n_epochs", "batch_size", "learning_rate_multiplier"})
_MAX_PAGE = 10_000


def plain_request(fields: Fields) -> dict[str, Any]:
    """OpenAI's body in the words of CreateJobRequest: method and hyperparameters brought into place."""
    body = dict(fields.body)
    hyperparameters = _read_hyperparameters(fields.object("hyperparameters"))
    body.pop("hyperparameters", None)
    if body.pop("integrations", None):
        raise fields.fail("integrations", "is not supported.")
    if isinstance(body.get("method"), Mapping):
        method = Fields(body["method"], "method.")
        kind = method.string("type", "supervised") or "supervised"
        method.only(frozenset({"type", kind}), "method")
        body["method"] = kind
        settings = method.object(kind)
        if settings is not None and kind == "supervised":
            settings.only(frozenset({"hyperparameters"}), f"method.{kind}")
            hyperparameters |= _read_hyperparameters(settings.object("hyperparameters"))
    if hyperparameters:
        training = fields.object("training")
        given = dict(training.body) if training is not None else {}
        for name, value in hyperparameters.items():
            if given.get(name, value) != value:
                raise InvalidRequest(
                    f"training.{name} contradicts the hyperparameters.", param=f"training.{name}"
                )
        body["training"] = {**hyperparameters, **given}
    return {name: value for name, value in body.items() if value is not None}


def _read_hyperparameters(fields: Fields | None) -> dict[str, Any]:
    if fields is None:
        return {}
    fields.only(_HYPERPARAMETERS, "hyperparameters")
    return {name: value for name, value in fields.body.items() if value not in (None, "auto")}


def job_body(job: JobRecord) -> dict[str, Any]:
    """OpenAI's job object with our additions."""
    hyperparameters = {
        "n_epochs": job.training.n_epochs,
        "batch_size": job.training.batch_size,
        "learning_rate_multiplier": job.training.learning_rate / 2e-4,
    }
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
        "error": {"code": error.code, "message": error.message, "param": error.param} if error else None,
        "hyperparameters": hyperparameters,
        "method": {"type": job.method, job.method: {"hyperparameters": hyperparameters}},
        "training_file": job.training_file,
        "validation_file": None,
        "result_files": job.result_files,
        "trained_tokens": job.trained_tokens,
        "seed": job.seed,
        "integrations": [],
        "metadata": job.metadata,
        "adapter": job.adapter or None,
        "init_from": job.init_from or None,
        "priority": job.priority,
        "progress": {
            "step": job.step,
            "total_steps": job.total_steps,
            "epoch": job.epoch,
            "tokens_per_second": job.tokens_per_second,
            "share": job.share,
        },
        "peft": peft_config(job.lora, job.model),
        "training": {name: getattr(job.training, name) for name in job.training.__struct_fields__},
    }


def event_body(event: JobEvent) -> dict[str, Any]:
    """OpenAI's event object: status and checkpoint events are messages here."""
    data: dict[str, Any] = {}
    if event.type == "metrics":
        data = {
            "step": event.step,
            "total_steps": event.total_steps,
            "train_loss": event.loss,
            "epoch": event.epoch,
            "learning_rate": event.learning_rate,
            "grad_norm": event.grad_norm,
            "tokens_per_second": event.tokens_per_second,
            "share": event.share,
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


def checkpoint_body(job: JobRecord, checkpoint: CheckpointRow) -> dict[str, Any]:
    """OpenAI's checkpoint object."""
    _, name = checkpoint_names(job, checkpoint)
    return {
        "id": checkpoint.id,
        "object": "fine_tuning.job.checkpoint",
        "created_at": checkpoint.created_at,
        "fine_tuned_model_checkpoint": name,
        "fine_tuning_job_id": checkpoint.job_id,
        "step_number": checkpoint.step,
        "metrics": {"step": checkpoint.step, "train_loss": checkpoint.train_loss},
    }


def _metadata_filter(request: Request) -> dict[str, str]:
    found = {}
    for name, value in request.query_params.items():
        if name.startswith("metadata[") and name.endswith("]"):
            found[name[len("metadata[") : -1]] = value
    return found


def routes(context: Context) -> list[Route]:
    """This resource's routes."""
    jobs = context.jobs

    async def create(request: Request) -> Response:
        body = plain_request(await read_json(request))
        key = request.headers.get("idempotency-key")
        if key and "idempotency_key" not in body:
            body["idempotency_key"] = key
        return json_response(job_body(await jobs.create(body)))

    async def list_jobs(request: Request) -> Response:
        found = await jobs.records.list(_metadata_filter(request))
        if request.query_params.get("metadata") == "null":
            found = [job for job in found if not job.metadata]
        limit = query_limit(request, 20, _MAX_PAGE)
        return json_response(list_body(request, found, lambda job: job.id, job_body, limit))

    async def get_job(request: Request) -> Response:
        return json_response(job_body(await jobs.records.get(request.path_params["id"])))

    async def cancel(request: Request) -> Response:
        return json_response(job_body(await jobs.cancel(request.path_params["id"])))

    async def pause(request: Request) -> Response:
        return json_response(job_body(await jobs.pause(request.path_params["id"])))

    async def resume(request: Request) -> Response:
        return json_response(job_body(await jobs.resume(request.path_params["id"])))

    async def events(request: Request) -> Response:
        found = (await jobs.records.events(request.path_params["id"]))[::-1]
        limit = query_limit(request, 20, _MAX_PAGE)
        return json_response(list_body(request, found, lambda event: event.id, event_body, limit))

    async def checkpoints(request: Request) -> Response:
        job = await jobs.records.get(request.path_params["id"])
        found = await jobs.records.checkpoints(job.id)
        limit = query_limit(request, 10, _MAX_PAGE)
        return json_response(
            list_body(request, found, lambda row: row.id, lambda row: checkpoint_body(job, row), limit)
        )

    root = "/v1/fine_tuning/jobs"
    return [
        Route("POST", root, create, TUNE),
        Route("GET", root, list_jobs, TUNE),
        Route("GET", root + "/{id}", get_job, TUNE),
        Route("POST", root + "/{id}/cancel", cancel, TUNE),
        Route("POST", root + "/{id}/pause", pause, TUNE),
        Route("POST", root + "/{id}/resume", resume, TUNE),
        Route("GET", root + "/{id}/events", events, TUNE),
        Route("GET", root + "/{id}/checkpoints", checkpoints, TUNE),
    ]
