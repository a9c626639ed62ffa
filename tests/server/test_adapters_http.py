"""Adapters over HTTP: loading, versions, archives, refusals, and never the base by accident."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import httpx
import pytest

from coserve.errors import InvalidRequest
from tests.server.fake_engine import write_peft
from tests.server.running import BASE, ServerThread, wait_for


def load(http: httpx.Client, name: str, path: Path | str, **more: object) -> httpx.Response:
    return http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path), **more})


def unload(http: httpx.Client, name: str) -> httpx.Response:
    return http.post("/v1/unload_lora_adapter", json={"lora_name": name})


def chat(http: httpx.Client, model: str) -> httpx.Response:
    body = {"model": model, "messages": [{"role": "user", "content": "Hi"}]}
    return http.post("/v1/chat/completions", json=body)


def tar_of(directory: Path, folder: str = "") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for path in directory.iterdir():
            tar.add(path, arcname=folder + path.name)
    return out.getvalue()


def test_load_use_unload(server: ServerThread, http: httpx.Client, adapter_root: Path) -> None:
    source = write_peft(adapter_root / "lu", seed=1)
    response = load(http, "lu", source)
    assert response.status_code == 200 and "lu" in response.text
    card = next(model for model in http.get("/v1/models").json()["data"] if model["id"] == "lu")
    assert (card["parent"], card["root"], card["version"]) == (BASE, str(source), 1)
    assert card["digest"] in server.engine.loaded
    assert chat(http, "lu").json()["model"] == "lu"
    adapter = server.engine.requests[-1].adapter
    assert adapter is not None and adapter.digest == card["digest"]
    assert not Path(adapter.path).is_relative_to(adapter_root)
    again = load(http, "lu", source)
    assert again.status_code == 400 and again.json()["error"]["param"] == "lora_name"
    assert unload(http, "lu").status_code == 200
    assert card["digest"] not in server.engine.loaded
    wait_for(lambda: not Path(adapter.path).exists())
    assert chat(http, "lu").status_code == 404
    assert unload(http, "lu").status_code == 404


def test_versions(server: ServerThread, http: httpx.Client, adapter_root: Path) -> None:
    load(http, "v", write_peft(adapter_root / "v1", seed=1))
    assert load(http, "v", write_peft(adapter_root / "v2", seed=2), load_inplace=True).status_code == 200
    used, fingerprints = [], []
    for name in ("v", "v@1", "v@2"):
        answer = chat(http, name)
        assert answer.status_code == 200
        used.append(server.engine.requests[-1].adapter)
        fingerprints.append(answer.json()["system_fingerprint"])
    base = chat(http, BASE).json()["system_fingerprint"]
    assert fingerprints == [f"{base}_{adapter.digest[:12]}" for adapter in used]
    assert [adapter.version for adapter in used] == [2, 1, 2]
    assert used[0].digest == used[2].digest != used[1].digest
    assert chat(http, "v@3").status_code == 404
    assert chat(http, "v@x").status_code == 404
    assert http.delete("/v1/models/v@2").json() == {"id": "v@2", "object": "model", "deleted": True}
    assert http.get("/v1/models/v").json()["version"] == 1
    assert http.delete("/v1/models/v").status_code == 200
    load(http, "v", adapter_root / "v1")
    assert http.get("/v1/models/v").json()["version"] == 3


@pytest.mark.parametrize(
    ("name", "path", "status"),
    [
        ("", "x", 400),
        ("a/b", "x", 400),
        (".hidden", "x", 400),
        (BASE, "x", 400),
        ("ok", "", 400),
        ("ok", "/etc", 400),
        ("ok", "{root}/../elsewhere", 400),
        ("ok", "{root}/missing", 404),
        ("ok", "{root}/empty", 400),
    ],
)
def test_load_refusals(http: httpx.Client, adapter_root: Path, name: str, path: str, status: int) -> None:
    (adapter_root / "empty").mkdir(exist_ok=True)
    response = load(http, name, path.replace("{root}", str(adapter_root)))
    assert response.status_code == status, response.text
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert "ok" not in [model["id"] for model in http.get("/v1/models").json()["data"]]


def test_a_link_out_of_the_root_is_refused(http: httpx.Client, adapter_root: Path, tmp_path: Path) -> None:
    (adapter_root / "link").symlink_to(write_peft(tmp_path / "outside"))
    response = load(http, "linked", adapter_root / "link")
    assert response.status_code == 400 and response.json()["error"]["code"] == "path_not_allowed"


def test_an_adapter_the_engine_refuses_is_not_listed(
    server: ServerThread, http: httpx.Client, adapter_root: Path
) -> None:
    server.engine.fail_load = InvalidRequest("broken tensors", param="lora_path")
    response = load(http, "bad", write_peft(adapter_root / "bad", seed=3))
    assert response.status_code == 400 and "broken tensors" in response.json()["error"]["message"]
    assert http.get("/v1/models/bad").status_code == 404
    server.engine.fail_load = None
    assert load(http, "bad", adapter_root / "bad").status_code == 200


def test_upload_and_download(http: httpx.Client, tmp_path: Path) -> None:
    source = write_peft(tmp_path / "up", seed=4)
    body = http.post("/v1/adapters?name=up", content=tar_of(source, "folder/")).json()
    assert (body["name"], body["version"], body["rank"], body["status"]) == ("up", 1, 4, "ready")
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as bundle:
        for path in source.iterdir():
            bundle.write(path, path.name)
    form = http.post("/v1/adapters", data={"name": "up"}, files={"file": ("a.zip", zipped.getvalue())})
    assert form.json()["version"] == 2 and form.json()["digest"] == body["digest"]
    content = http.get("/v1/adapters/up/content")
    with tarfile.open(fileobj=io.BytesIO(content.content)) as tar:
        for path in source.iterdir():
            member = tar.extractfile(path.name)
            assert member is not None and member.read() == path.read_bytes()
    assert unload(http, "up").status_code == 200
    assert http.get("/v1/adapters/up/content").status_code == 404


def archive(*members: tuple[str, bytes | None]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            if data is None:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            else:
                info.size = len(data)
            tar.addfile(info, io.BytesIO(data or b""))
    return out.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no archive at all",
        archive(("adapter_config.json", b"{}")),
        archive(("../adapter_config.json", b"{}"), ("adapter_model.safetensors", b"x")),
        archive(("/adapter_config.json", b"{}"), ("adapter_model.safetensors", b"x")),
        archive(("adapter_config.json", None), ("adapter_model.safetensors", b"x")),
        archive(("adapter_config.json", b"{}"), ("adapter_model.safetensors", b"x")),
        archive(("adapter_config.json", b"{}"), ("adapter_model.bin", b"pickle")),
        archive(*[("adapter_config.json", b"{}")] * 2),
    ],
    ids=["empty", "noise", "half", "up", "absolute", "link", "unreadable", "pickle", "twice"],
)
def test_hostile_archives(http: httpx.Client, data: bytes) -> None:
    response = http.post("/v1/adapters?name=hostile", content=data)
    assert response.status_code == 400, response.text
    assert http.get("/v1/models/hostile").status_code == 404


@pytest.mark.parametrize("path", ["\x00", "a" * 5000, "~nobody-here/x", "a/" * 3000, "ROOT/" + "a" * 300])
def test_what_is_no_path(http: httpx.Client, adapter_root: Path, path: str) -> None:
    refused = load(http, "nopath", path.replace("ROOT", str(adapter_root)))
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "lora_path")
