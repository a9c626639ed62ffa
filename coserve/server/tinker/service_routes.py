"""Sessions, and what a client wants to know before it begins."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from coserve.errors import Gone
from coserve.server.auth import USE
from coserve.server.context import Context
from coserve.server.fields import Fields
from coserve.server.http import Route, json_response, read_body
from coserve.server.openai.paging import query_limit
from coserve.server.tinker.listing import query_offset
from coserve.server.tinker.passes import MAX_DATA
from coserve.server.tinker.routes import PREFIX, read_fields

MAX_TELEMETRY = 1 << 20  # bytes
MAX_METADATA = 100, 1 << 16  # entries, and bytes of JSON
_CREATE = frozenset({"tags", "user_metadata", "sdk_version", "project_id", "display_name"})
_FINISH = frozenset({"reason", "detail"})

CLIENT_CONFIG: dict[str, Any] = {
    "pjwt_auth_enabled": False,
    "credential_default_source": "api_key",
    "parallel_fwdbwd_chunks": True,
    "proto_compress_fwdbwd": False,
    "fwdbwd_max_chunk_len": MAX_DATA,
    "fwdbwd_max_chunk_bytes_count": 5_000_000,
    "sample_use_retrieve_futures": False,
    "custom_loss_server_side": False,
    "sample_join_sampling_session": False,
}
DYNAMIC_CONFIG = {"refresh_interval_sec": 300, "sample_cancel_enabled": True}


def read_metadata(fields: Fields, name: str = "user_metadata") -> dict[str, Any] | None:
    """An object of at most 100 entries and 64 KiB, as it came."""
    given, (entries, size) = fields.object(name), MAX_METADATA
    if given is None:
        return None
    if len(given.body) > entries:
        raise fields.fail(name, f"must have at most {entries} entries, not {len(given.body)}.")
    if len(msgspec.json.encode(given.body)) > size:
        raise fields.fail(name, f"must have at most {size} bytes.")
    return dict(given.body)


def routes(context: Context) -> list[Route]:
    """/api/v1: sessions, health, capabilities, configuration, telemetry."""
    tinker = context.tinker

    async def create_session(request: Request) -> Response:
        """Begin a session; its models and samplers go when it is finished, or silent for five minutes."""
        fields = await read_fields(request, _CREATE, "create_session")
        fields.strings("tags")
        metadata = read_metadata(fields)
        name = fields.string("display_name", None, 512)
        session = tinker.sessions.create(request.state.key, metadata, name)
        return json_response({"type": "create_session", "session_id": session.id})

    async def heartbeat(request: Request) -> Response:
        """A session's sign of life; 410 once it has ended."""
        fields = await read_fields(request, frozenset({"session_id"}), "session_heartbeat")
        tinker.sessions.get(fields.required_string("session_id"), request.state.key)
        return json_response({"type": "session_heartbeat"})

    async def list_sessions(request: Request) -> Response:
        """The key's sessions, the newest first."""
        limit, offset = query_limit(request, 20, 1000), query_offset(request)
        found = tinker.sessions.of(request.state.key)[offset : offset + limit]
        return json_response({"sessions": [session.id for session in found]})

    async def get_session(request: Request) -> Response:
        """What a session has made."""
        session = tinker.sessions.find(request.path_params["id"], request.state.key)
        return json_response(
            {
                "training_run_ids": session.model_ids,
                "sampler_ids": session.sampler_ids,
                "user_metadata": session.metadata,
                "display_name": session.display_name,
            }
        )

    async def finish_session(request: Request) -> Response:
        """End a session now."""
        await read_fields(request, _FINISH, "finish_session")
        try:
            session = tinker.sessions.get(request.path_params["id"], request.state.key)
        except Gone:
            return json_response({})
        await tinker.end(session)
        return json_response({})

    async def healthz(request: Request) -> Response:
        """The engine is there; 503 while it isn't."""
        context.lifecycle.check_ready()
        return json_response({"status": "ok"})

    async def capabilities(request: Request) -> Response:
        """The base model, which can be trained and sampled from."""
        model = {
            "model_name": tinker.base.name,
            "max_context_length": tinker.base.max_model_len,
            "trainable": True,
            "sampleable": True,
        }
        return json_response({"supported_models": [model]})

    async def client_config(request: Request) -> Response:
        """How a client should talk to this server."""
        await read_fields(request, frozenset({"sdk_version"}), "client_config")
        return json_response(CLIENT_CONFIG)

    async def dynamic_config(request: Request) -> Response:
        """The same, of what may change."""
        await read_fields(request, frozenset({"sdk_version"}), "client_config")
        return json_response(DYNAMIC_CONFIG)

    async def telemetry(request: Request) -> Response:
        """Accepted, and dropped unread."""
        await read_body(request, MAX_TELEMETRY)
        return json_response({"status": "accepted"})

    return [
        Route("POST", PREFIX + "create_session", create_session, USE),
        Route("POST", PREFIX + "session_heartbeat", heartbeat, USE),
        Route("GET", PREFIX + "sessions", list_sessions, USE),
        Route("GET", PREFIX + "sessions/{id}", get_session, USE),
        Route("POST", PREFIX + "sessions/{id}/finish", finish_session, USE),
        Route("GET", PREFIX + "healthz", healthz, USE),
        Route("GET", PREFIX + "get_server_capabilities", capabilities, USE),
        Route("POST", PREFIX + "client/config", client_config, USE),
        Route("POST", PREFIX + "client/dynamic_config", dynamic_config, USE),
        Route("POST", PREFIX + "telemetry", telemetry, USE),
    ]
