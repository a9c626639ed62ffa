"""Training runs and what they have saved."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from coserve.server.auth import TUNE
from coserve.server.context import Context
from coserve.server.http import Route, json_response
from coserve.server.tinker.listing import moment, page
from coserve.server.tinker.routes import PREFIX, read_fields
from coserve.server.tinker.runs import SAMPLER, WEIGHTS, Runs, check_ttl, newest
from coserve.server.tinker.store import Run, Saved

_RUN = PREFIX + "training_runs/{id}"
_ONE = _RUN + "/checkpoints/{kind}/{name}"
_TYPES = {WEIGHTS: "training", SAMPLER: "sampler"}


def saved_body(saved: Saved) -> dict[str, Any]:
    """A save as it is listed."""
    return {
        "checkpoint_id": f"{saved.kind}/{saved.name}",
        "checkpoint_type": _TYPES[saved.kind],
        "time": moment(saved.created_at),
        "tinker_path": saved.path,
        "size_bytes": saved.size_bytes,
        "public": False,
        "user_metadata": saved.user_metadata,
        "expires_at": moment(saved.expires_at),
    }


def run_body(run: Run, saved: list[Saved]) -> dict[str, Any]:
    """A run as it is listed; `saved` is all that it has saved, newest first."""
    last, last_sampler = newest(saved, WEIGHTS), newest(saved, SAMPLER)
    metadata = run.user_metadata
    return {
        "training_run_id": run.id,
        "base_model": run.base_model,
        "model_owner": run.tenant or "local",
        "is_lora": True,
        "corrupted": False,
        "lora_rank": run.lora.r,
        "last_request_time": moment(run.seen_at),
        "last_checkpoint": last and saved_body(last),
        "last_sampler_checkpoint": last_sampler and saved_body(last_sampler),
        "user_metadata": metadata and {name: str(value) for name, value in metadata.items()},
    }


def routes(context: Context) -> list[Route]:
    """/api/v1: training_runs, checkpoints, weights_info."""
    runs = context.tinker.runs

    async def list_runs(request: Request) -> Response:
        """The key's runs, the newest first."""
        key = request.state.key
        body = page(
            request, "training_runs", runs.of(key), lambda r: run_body(r, runs.saved_of(key, r.id)), 20
        )
        return json_response(body)

    async def get_run(request: Request) -> Response:
        """One run."""
        run = runs.run(request.path_params["id"], request.state.key)
        return json_response(run_body(run, runs.saved_of(request.state.key, run.id)))

    async def list_of_run(request: Request) -> Response:
        """What a run has saved, the newest first."""
        run = runs.run(request.path_params["id"], request.state.key)
        found = runs.saved_of(request.state.key, run.id)
        return json_response({"checkpoints": [saved_body(saved) for saved in found], "cursor": None})

    async def list_all(request: Request) -> Response:
        """What the key has saved, the newest first."""
        return json_response(page(request, "checkpoints", runs.saved_of(request.state.key), saved_body, 100))

    async def delete(request: Request) -> Response:
        """Delete a save; requests that read it end on it."""
        await runs.delete(_saved(runs, request))
        return Response(status_code=204)

    async def set_ttl(request: Request) -> Response:
        """When a save goes; null: never."""
        fields = await read_fields(request, frozenset({"ttl_seconds"}), "set_ttl")
        await runs.set_ttl(_saved(runs, request), check_ttl(fields.integer("ttl_seconds")))
        return Response(status_code=204)

    async def weights_info(request: Request) -> Response:
        """What a model has to be to load a save."""
        fields = await read_fields(request, frozenset({"tinker_path"}), "weights_info")
        path = fields.required_string("tinker_path")
        run = runs.run_of(runs.saved(path, request.state.key, "tinker_path"))
        return json_response(
            {
                "base_model": run.base_model,
                "is_lora": True,
                "lora_rank": run.lora.r,
                "train_unembed": run.train_unembed,
                "train_mlp": run.train_mlp,
                "train_attn": run.train_attn,
            }
        )

    return [
        Route("GET", PREFIX + "training_runs", list_runs, TUNE),
        Route("GET", _RUN, get_run, TUNE),
        Route("GET", _RUN + "/checkpoints", list_of_run, TUNE),
        Route("GET", PREFIX + "checkpoints", list_all, TUNE),
        Route("DELETE", _ONE, delete, TUNE),
        Route("PUT", _ONE + "/ttl", set_ttl, TUNE),
        Route("POST", PREFIX + "weights_info", weights_info, TUNE),
    ]


def _saved(runs: Runs, request: Request) -> Saved:
    given = request.path_params
    path = f"tinker://{given['id']}/{given['kind']}/{given['name']}"
    return runs.saved(path, request.state.key, "checkpoint_id")
