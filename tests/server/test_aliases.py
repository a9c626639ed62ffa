"""Names that mean a model until they are moved: over HTTP and gRPC, and after a restart."""

from __future__ import annotations

import json
from pathlib import Path

import grpc
import httpx
import pytest

from coserve.config import EngineConfig
from coserve.server.grpc_gen import adapters_pb2
from tests.server.fake_engine import write_peft
from tests.server.running import BASE, ServerThread
from tests.server.test_adapters_http import chat, load, unload
from tests.server.test_grpc import Stubs, failure


def put(http: httpx.Client, alias: str, model: object) -> httpx.Response:
    return http.put(f"/v1/aliases/{alias}", json={"model": model})


@pytest.fixture
def adapters(http: httpx.Client, adapter_root: Path) -> None:
    """`al` with two versions."""
    for seed in (1, 2):
        source = write_peft(adapter_root / f"al{seed}", seed=seed)
        assert load(http, "al", source, load_inplace=True).status_code == 200


def test_an_alias_moves_between_base_adapter_and_version(
    server: ServerThread, http: httpx.Client, adapters: None
) -> None:
    def used(name: str) -> tuple[str, int | None]:
        answer = chat(http, name)
        assert answer.status_code == 200, answer.text
        adapter = server.engine.requests[-1].adapter
        return answer.json()["model"], adapter.version if adapter is not None else None

    newest = http.get("/v1/models/al").json()["version"]
    assert put(http, "prod", BASE).json()["model"] == BASE
    assert used("prod") == ("prod", None)
    assert put(http, "prod", "al").status_code == 200
    assert used("prod") == ("prod", newest)
    assert put(http, "prod", f"al@{newest - 1}").status_code == 200
    assert used("prod") == ("prod", newest - 1)
    card = http.get("/v1/models/prod").json()
    assert (card["id"], card["alias_of"], card["parent"]) == ("prod", f"al@{newest - 1}", BASE)
    assert card in http.get("/v1/models").json()["data"]
    assert [found["alias"] for found in http.get("/v1/aliases").json()["data"]] == ["prod"]
    assert http.get("/v1/aliases/prod").json()["model"] == f"al@{newest - 1}"

    refused = unload(http, "al")
    assert refused.status_code == 400 and refused.json()["error"]["code"] == "adapter_has_alias"
    assert http.delete(f"/v1/models/al@{newest - 1}").json()["error"]["code"] == "adapter_has_alias"
    assert http.delete(f"/v1/models/al@{newest}").status_code == 200
    assert http.delete("/v1/aliases/prod").json()["deleted"] is True
    assert chat(http, "prod").status_code == 404
    assert unload(http, "al").status_code == 200


def test_an_alias_never_hides_an_adapter_nor_means_an_alias(http: httpx.Client, adapters: None) -> None:
    assert put(http, "one", "al").status_code == 200
    for alias, model, status, param in (
        ("two", "one", 400, "model"),
        ("two", "nobody", 404, "model"),
        ("two", 5, 400, "model"),
        ("al", BASE, 400, "alias"),
        (BASE, "al", 400, "alias"),
        ("ftjob-x", "al", 400, "alias"),
        ("a b", "al", 400, "alias"),
    ):
        refused = put(http, alias, model)
        assert (refused.status_code, refused.json()["error"]["param"]) == (status, param), refused.text
    taken = load(http, "one", "/nowhere")
    assert taken.status_code == 400 and "alias" in taken.json()["error"]["message"]
    assert http.put("/v1/aliases/two", json={"model": "al", "x": 1}).json()["error"]["param"] == "x"
    assert http.delete("/v1/aliases/two").status_code == http.get("/v1/aliases/two").status_code == 404
    assert http.delete("/v1/models/one").json()["deleted"] is True
    assert unload(http, "al").status_code == 200


def test_over_grpc(server: ServerThread, http: httpx.Client) -> None:
    with server.channel() as channel:
        stub = Stubs(channel).adapters
        made = stub.SetAlias(adapters_pb2.SetAliasRequest(alias="g", model=BASE))
        assert (made.alias, made.model) == ("g", BASE)
        assert list(stub.ListAliases(adapters_pb2.ListAliasesRequest()).aliases) == [made]
        assert chat(http, "g").status_code == 200
        unknown = failure(stub.SetAlias, adapters_pb2.SetAliasRequest(alias="h", model="nobody"))
        assert unknown[0] is grpc.StatusCode.NOT_FOUND
        assert failure(stub.SetAlias, adapters_pb2.SetAliasRequest(alias="h"))[2] == "model"
        stub.DeleteAlias(adapters_pb2.DeleteAliasRequest(alias="g"))
        assert chat(http, "g").status_code == 404


def test_aliases_outlive_a_restart(tmp_path: Path) -> None:
    server = ServerThread(tmp_path / "state")
    with server.http() as http:
        put(http, "kept", BASE)
    server.stop()
    server = ServerThread(tmp_path / "state")
    with server.http() as http:
        assert chat(http, "kept").json()["model"] == "kept"
    server.stop()


def test_a_base_of_another_name_leaves_out_its_aliases(tmp_path: Path) -> None:
    server = ServerThread(tmp_path / "state")
    with server.http() as http:
        put(http, "kept", BASE)
        put(http, "renamed", BASE)
    server.stop()
    server = ServerThread(tmp_path / "state", engine=EngineConfig(model="", served_model_name="renamed"))
    with server.http() as http:
        assert [card["id"] for card in http.get("/v1/models").json()["data"]] == ["renamed"]
        assert chat(http, "renamed").json()["model"] == "renamed"
        assert chat(http, "kept").status_code == 404
    server.stop()
    server = ServerThread(tmp_path / "state")
    with server.http() as http:
        assert [alias["alias"] for alias in http.get("/v1/aliases").json()["data"]] == ["kept", "renamed"]
    server.stop()


def test_an_alias_of_the_bases_other_name_is_for_keys_that_see_the_base(tmp_path: Path) -> None:
    keys = [{"key": "a", "role": "admin"}, {"key": "t", "role": "tune", "models": ["x", "other"]}]
    (tmp_path / "keys.json").write_text(json.dumps({"keys": keys}))
    server = ServerThread(
        tmp_path / "state", served_model_names=("other",), keys_file=str(tmp_path / "keys.json")
    )
    with server.http() as http:
        admin, tuner = {"authorization": "Bearer a"}, {"authorization": "Bearer t"}
        body = {"model": "other"}
        assert http.put("/v1/aliases/x", json=body, headers=tuner).status_code == 404
        assert http.put("/v1/aliases/x", json=body, headers=admin).status_code == 200
        assert http.get("/v1/models", headers=tuner).json()["data"] == []
        assert http.get("/v1/aliases/x", headers=tuner).status_code == 404
    server.stop()
