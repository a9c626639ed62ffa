"""Every route and every gRPC method with every role, no key, and keys that aren't known.

Routes and methods are taken from the server itself: a new one fails here until this page says who may use it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from coserve.server.app import all_routes
from coserve.server.grpc_gen import adapters_pb2, fine_tuning_pb2, inference_pb2
from coserve.server.grpc_server import SERVICES
from tests.server.running import ServerThread

OPEN = {"/health", "/ready"}
ANYBODY_WITH_A_KEY = {"/metrics"}
CHAT = {
    *("/ping", "/version", "/load", "/tokenize", "/detokenize", "/v1/embeddings"),
    *("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models", "/v1/aliases"),
}
# Of Tinker's API: sessions, and sampling from what was trained.
SAMPLING = {
    f"/api/v1/{name}"
    for name in (
        *("create_session", "session_heartbeat", "sessions", "healthz", "get_server_capabilities", "client"),
        *("telemetry", "create_sampling_session", "samplers", "asample", "retrieve_future", "cancel_future"),
    )
}
TUNING = {
    *("/v1/files", "/v1/uploads", "/v1/fine_tuning/jobs", "/v1/fine_tuning/alpha", "/v1/adapters", "/api/v1"),
    *("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/load_lora_adapter", "/unload_lora_adapter"),
}
OPERATORS = {"/v1/fine_tuning/checkpoints"}
ONLY_READ_IN_CHAT = {"/v1/models", "/v1/aliases"}
KEYS = {"use": "key-use", "tune": "key-tune", "admin": "key-admin", "metrics": "key-metrics"}
SERVICE_ROLES = {
    "coserve.v1.FineTuningService": {"tune", "admin"},
    "coserve.v1.AdapterService": {"tune", "admin"},
    "coserve.v1.InferenceService": {"use", "tune", "admin"},
}
UNKNOWN = [
    None,
    "Bearer",
    "key-use",
    "Basic key-use",
    "Bearer key-us",
    "Bearer KEY-USE",
    "Bearer key-use key-use",
]


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerThread]:
    folder = tmp_path_factory.mktemp("rights")
    entries = "".join(f'[[keys]]\nkey = "{key}"\nrole = "{role}"\n' for role, key in KEYS.items())
    (folder / "keys.toml").write_text(entries)
    server = ServerThread(folder / "s", keys_file=str(folder / "keys.toml"))
    yield server
    server.stop()


def who_may(method: str, path: str) -> set[str]:
    """The roles that may use a route, by this page."""

    def below(roots: set[str]) -> str:
        return next((root for root in roots if path == root or path.startswith(root + "/")), "")

    if path in ANYBODY_WITH_A_KEY:
        return {"use", "tune", "admin", "metrics"}
    if below(OPERATORS):
        return {"admin"}
    if below(SAMPLING):
        return {"use", "tune", "admin"}
    if below(TUNING) or (below(ONLY_READ_IN_CHAT) and method != "GET"):
        return {"tune", "admin"}
    assert below(CHAT), f"{method} {path} is new: say here who may use it"
    return {"use", "tune", "admin"}


def test_every_route_with_every_key(keyed: ServerThread) -> None:
    routes = [(route.method, route.path) for route in all_routes(keyed.server.context)]
    assert len(routes) > 40
    with httpx.Client(base_url=keyed.url, timeout=20, verify=False) as http:
        for method, template in routes:
            path = re.sub(r"\{[^}]*\}", "nothing", template)
            if path in OPEN:
                assert http.request(method, path).status_code == 200
                continue
            for value in UNKNOWN:
                sent = {} if value is None else {"authorization": value}
                answer = http.request(method, path, headers=sent)
                assert answer.status_code == 401, (method, path, value)
                assert answer.json()["error"]["code"] == "invalid_api_key"
                assert answer.headers["www-authenticate"] == "Bearer"
            allowed = who_may(method, template)
            for role, key in KEYS.items():
                answer = http.request(method, path, headers={"authorization": f"Bearer {key}"})
                assert answer.status_code != 401 and answer.status_code < 500, (method, path, role)
                assert (answer.status_code != 403) == (role in allowed), (method, path, role)


def test_paths_that_are_no_routes_need_a_key_too(keyed: ServerThread) -> None:
    """So nobody learns the routes, nor comes past the open ones by spelling."""
    odd = ["/v1/nothing", "/", "//health", "/health/", "/HEALTH", "/%2e%2e/health", "/ready/../v1/models"]
    odd += ["/health%2f..%2fv1/models", "/health;/v1/models", "/v1//models", "/health%00"]
    for path in odd:
        answer = httpx.request("GET", httpx.URL(keyed.url).copy_with(raw_path=path.encode()), verify=False)
        assert answer.status_code == 401, path


# ---------------------------------------------------------------------- gRPC


def methods() -> list[tuple[str, Any]]:
    """(full name, descriptor) of every method of every service."""
    found = []
    for page in (fine_tuning_pb2, adapters_pb2, inference_pb2):
        for service in page.DESCRIPTOR.services_by_name.values():
            assert service.full_name in SERVICES
            found += [(f"/{service.full_name}/{method.name}", method) for method in service.methods]
    return found


def call(
    server: ServerThread, name: str, takes_many: bool, gives_many: bool, key: str | None
) -> grpc.StatusCode:
    """The status of one empty call."""
    metadata = [] if key is None else [("authorization", f"Bearer {key}")]
    with server.channel() as channel:
        kind = f"{'stream' if takes_many else 'unary'}_{'stream' if gives_many else 'unary'}"
        method = getattr(channel, kind)(name)
        try:
            answer = method(iter([b""]) if takes_many else b"", metadata=metadata, timeout=20)
            if gives_many:
                list(answer)
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK


@pytest.mark.parametrize(("name", "method"), methods(), ids=lambda value: getattr(value, "name", None))
def test_every_method_with_every_key(keyed: ServerThread, name: str, method: Any) -> None:
    shape = (method.client_streaming, method.server_streaming)
    for key in (None, "", "wrong", "key-us"):
        assert call(keyed, name, *shape, key) is grpc.StatusCode.UNAUTHENTICATED
    allowed = SERVICE_ROLES[name.split("/")[1]]
    for role, key in KEYS.items():
        status = call(keyed, name, *shape, key)
        assert status not in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNKNOWN)
        assert (status is not grpc.StatusCode.PERMISSION_DENIED) == (role in allowed), (role, status)


def test_health_is_open_and_nothing_else(keyed: ServerThread) -> None:
    with keyed.channel() as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", *SERVICES):
            answer = stub.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
    listing = f"/{reflection.SERVICE_NAME}/ServerReflectionInfo"
    for name in (listing, "/coserve.v1.FineTuningService/Nothing", "/other.Service/Method"):
        assert call(keyed, name, True, True, None) is grpc.StatusCode.UNAUTHENTICATED
    assert call(keyed, listing, True, True, KEYS["metrics"]) is grpc.StatusCode.PERMISSION_DENIED
    assert call(keyed, listing, True, True, KEYS["use"]) is grpc.StatusCode.OK


def test_a_refused_call_is_not_read(keyed: ServerThread) -> None:
    """Who has no key is refused before the message is there: nothing of it is held in memory."""

    with keyed.channel() as channel:
        upload = channel.stream_unary("/coserve.v1.FineTuningService/UploadFile")
        with pytest.raises(grpc.RpcError) as refusal:
            upload((b"" for _ in iter(int, 1)), timeout=20)
        assert refusal.value.code() is grpc.StatusCode.UNAUTHENTICATED
