"""/v1/fine_tuning/jobs."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from coserve.errors import InvalidRequest
from coserve.server.auth import ADMIN, TUNE
from coserve.server.context import Context
from coserve.server.http import Route, json_response, read_json
from coserve.server.job_store import JobRecord
from coserve.server.openai.job_bodies import checkpoint_body, event_body, job_body, plain_request
from coserve.server.openai.paging import list_body, page_body, query_limit

_ROOT = "/v1/fine_tuning/jobs"
_MAX_PAGE = 10_000


def _metadata_filter(request: Request) -> dict[str, str]:
    found = {}
    for name, value in request.query_params.items():
        if name.startswith("metadata[") and name.endswith("]"):
            found[name[len("metadata[") : -1]] = value
    return found


async def _no_permissions(request: Request) -> Response:
    """Refused: there are no projects to share checkpoints with."""
    raise InvalidRequest(
        "Checkpoint permissions are not supported: this server has no projects; which checkpoints a key may "
        "use follows from the 'models' of the keys file.",
        code="unsupported",
    )


async def _no_graders(request: Request) -> Response:
    """Refused: there is no reinforcement fine-tuning."""
    raise InvalidRequest(
        "Graders are not supported: this server has no reinforcement fine-tuning.", code="unsupported"
    )


def routes(context: Context) -> list[Route]:
    """This resource's routes."""
    permissions = "/v1/fine_tuning/checkpoints/{name}/permissions"
    graders = "/v1/fine_tuning/alpha/graders"
    return [
        *_job_routes(context),
        *_log_routes(context),
        Route("GET", permissions, _no_permissions, ADMIN),
        Route("POST", permissions, _no_permissions, ADMIN),
        Route("DELETE", permissions + "/{permission}", _no_permissions, ADMIN),
        Route("POST", graders + "/run", _no_graders, TUNE),
        Route("POST", graders + "/validate", _no_graders, TUNE),
    ]


def _job_routes(context: Context) -> list[Route]:
    jobs = context.jobs

    def body_of(job: JobRecord) -> dict[str, object]:
        return job_body(job, jobs.model_config)

    async def create(request: Request) -> Response:
        """Create a job."""
        body = plain_request(await read_json(request))
        key = request.headers.get("idempotency-key")
        if key and "idempotency_key" not in body:
            body["idempotency_key"] = key
        return json_response(body_of(await jobs.create(body, request.state.key)))

    async def list_jobs(request: Request) -> Response:
        """Jobs, the newest first; `metadata[key]=value` picks some."""
        found = await jobs.records.list(request.state.key, _metadata_filter(request))
        if request.query_params.get("metadata") == "null":
            found = [job for job in found if not job.metadata]
        limit = query_limit(request, 20, _MAX_PAGE)
        return json_response(list_body(request, found, lambda job: job.id, body_of, limit))

    async def get_job(request: Request) -> Response:
        """One job."""
        return json_response(body_of(await jobs.records.get(request.path_params["id"], request.state.key)))

    async def cancel(request: Request) -> Response:
        """End a job; it publishes nothing."""
        return json_response(body_of(await jobs.cancel(request.path_params["id"], request.state.key)))

    async def pause(request: Request) -> Response:
        """Stop a job at its next optimizer step."""
        return json_response(body_of(await jobs.pause(request.path_params["id"], request.state.key)))

    async def resume(request: Request) -> Response:
        """Let a paused job go on."""
        return json_response(body_of(await jobs.resume(request.path_params["id"], request.state.key)))

    return [
        Route("POST", _ROOT, create, TUNE),
        Route("GET", _ROOT, list_jobs, TUNE),
        Route("GET", _ROOT + "/{id}", get_job, TUNE),
        Route("POST", _ROOT + "/{id}/cancel", cancel, TUNE),
        Route("POST", _ROOT + "/{id}/pause", pause, TUNE),
        Route("POST", _ROOT + "/{id}/resume", resume, TUNE),
    ]


def _log_routes(context: Context) -> list[Route]:
    records = context.jobs.records

    async def events(request: Request) -> Response:
        """What became of a job, the newest first."""
        limit, after = query_limit(request, 20, _MAX_PAGE), request.query_params.get("after")
        name, key = request.path_params["id"], request.state.key
        found, more = await records.newest_events(name, after, limit, key)
        return json_response(page_body(found, more, lambda event: event.id, event_body))

    async def checkpoints(request: Request) -> Response:
        """A job's checkpoints, the newest first."""
        job = await records.get(request.path_params["id"], request.state.key)
        found = await records.checkpoints(job.id, request.state.key)
        steps = await records.metrics_of(found)
        limit = query_limit(request, 10, _MAX_PAGE)
        return json_response(
            list_body(
                request,
                found,
                lambda row: row.id,
                lambda row: checkpoint_body(job, row, steps.get(row.id)),
                limit,
            )
        )

    return [
        Route("GET", _ROOT + "/{id}/events", events, TUNE),
        Route("GET", _ROOT + "/{id}/checkpoints", checkpoints, TUNE),
    ]
