"""Versions and pins over HTTP and gRPC: what a name means, what stays on the device, when files go."""

from __future__ import annotations

import asyncio
import hashlib
import io
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import pytest

from coserve.config import LoraModule
from coserve.errors import FailedPrecondition
from coserve.server.grpc_gen import adapters_pb2 as pb
from coserve.server.grpc_gen import adapters_pb2_grpc
from tests.server.fake_engine import write_peft
from tests.server.running import ServerThread, wait_for
from tests.server.test_adapters_http import chat, load, tar_of, unload


@pytest.fixture
def stub(server: ServerThread) -> Iterator[adapters_pb2_grpc.AdapterServiceStub]:
    with grpc.insecure_channel(server.server.grpc_address) as channel:
        yield adapters_pb2_grpc.AdapterServiceStub(channel)


def versions(http: httpx.Client, name: str) -> dict[str, dict]:
    data = http.get("/v1/adapters").json()["data"]
    return {f"{found['name']}@{found['version']}": found for found in data if found["name"] == name}


def used(server: ServerThread, http: httpx.Client, model: str) -> int:
    assert chat(http, model).status_code == 200
    adapter = server.engine.requests[-1].adapter
    assert adapter is not None
    return adapter.version


def test_one_version_is_unloaded_and_the_name_means_the_newest_other(
    server, http, stub, adapter_root
) -> None:
    for number in (1, 2, 3):
        load(http, "one", write_peft(adapter_root / f"one{number}", seed=number), load_inplace=True)
    assert used(server, http, "one") == 3
    assert unload(http, "one@3").status_code == 200
    assert used(server, http, "one") == 2 and chat(http, "one@3").status_code == 404
    stub.UnloadAdapter(pb.UnloadAdapterRequest(name="one", version=2))
    assert used(server, http, "one") == 1 and list(versions(http, "one")) == ["one@1"]
    with pytest.raises(grpc.RpcError) as refused:
        stub.UnloadAdapter(pb.UnloadAdapterRequest(name="one", version=2))
    assert refused.value.code() == grpc.StatusCode.NOT_FOUND
    load(http, "one", adapter_root / "one2", load_inplace=True)
    assert used(server, http, "one") == 4, "numbers aren't given twice"


def test_an_uploaded_version_comes_back_and_a_deleted_one_does_not(server, http, stub, tmp_path) -> None:
    archive = tar_of(write_peft(tmp_path / "back", seed=11))
    digest = http.post("/v1/adapters?name=back", content=archive).json()["digest"]
    folder = Path(server.server.context.adapters.get("back", key=None).version.path)
    assert unload(http, "back").status_code == 200
    assert digest not in server.engine.loaded and folder.exists() and chat(http, "back").status_code == 404
    assert stub.LoadAdapter(pb.LoadAdapterRequest(name="back")).digest == digest
    assert used(server, http, "back") == 1 and digest in server.engine.loaded
    assert http.delete("/v1/models/back").status_code == 200
    wait_for(lambda: not folder.exists())
    with pytest.raises(grpc.RpcError) as refused:
        stub.LoadAdapter(pb.LoadAdapterRequest(name="back"))
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_a_deleted_name_leaves_nothing_of_its_unloaded_versions(server, http, tmp_path) -> None:
    for seed in (21, 22):
        http.post("/v1/adapters?name=gone", content=tar_of(write_peft(tmp_path / f"gone{seed}", seed=seed)))
    folder = Path(server.server.context.adapters.get("gone", key=None).version.path).parent
    assert unload(http, "gone@1").status_code == 200 and (folder / "1").exists()
    assert http.delete("/v1/models/gone").status_code == 200
    wait_for(lambda: not folder.exists())


def test_a_pin_stays_with_its_name(server: ServerThread, http, stub, adapter_root: Path) -> None:
    digests = []
    for number in (1, 2):
        source = write_peft(adapter_root / f"pin{number}", seed=30 + number)
        more = {"pinned": True} if number == 1 else {"load_inplace": True}
        assert load(http, "pin", source, **more).status_code == 200
        digests.append(http.get("/v1/models/pin").json()["digest"])
    assert server.engine.pinned >= {digests[1]} and digests[0] not in server.engine.pinned
    found = versions(http, "pin")
    assert [found[name]["pinned"] for name in ("pin@1", "pin@2")] == [False, True]
    assert stub.RollbackAdapter(pb.RollbackAdapterRequest(name="pin")).pinned
    assert digests[0] in server.engine.pinned and digests[1] not in server.engine.pinned
    body = {"lora_name": "pin", "pinned": False}
    assert http.post("/v1/load_lora_adapter", json=body).status_code == 200
    assert not server.engine.pinned & set(digests)
    assert stub.LoadAdapter(pb.LoadAdapterRequest(name="pin", pinned=True)).pinned
    assert digests[0] in server.engine.pinned
    unload(http, "pin")
    assert not server.engine.pinned & set(digests)


def test_a_pin_that_is_refused_publishes_nothing(server: ServerThread, http, adapter_root: Path) -> None:
    source = write_peft(adapter_root / "full", seed=41)
    server.engine.fail_load = FailedPrecondition("--max-loras 1 has room for 0 pinned adapters")
    refused = load(http, "full", source, pinned=True)
    assert refused.status_code == 400 and "pinned" in refused.json()["error"]["message"]
    server.engine.fail_load = None
    assert http.get("/v1/models/full").status_code == 404
    body = {"lora_name": "full", "lora_path": str(source), "pinned": "yes"}
    assert http.post("/v1/load_lora_adapter", json=body).status_code == 400


def test_pins_are_there_after_a_restart(tmp_path: Path) -> None:
    source = write_peft(tmp_path / "source", seed=51)
    modules = (LoraModule("kept", str(source), pinned=True),)
    for _ in range(2):
        server = ServerThread(tmp_path / "state", lora_modules=modules)
        try:
            card = server.http().get("/v1/models/kept").json()
            assert card["version"] == 1 and server.engine.pinned == {card["digest"]}
        finally:
            server.stop()
    server = ServerThread(tmp_path / "state")
    try:
        assert server.engine.pinned == {card["digest"]}
        server.engine.pinned.clear()
        server.call(server.engine.on_restart())
        assert server.engine.pinned == {card["digest"]}
    finally:
        server.stop()


def test_an_archive_is_checked_against_its_digest(http: httpx.Client, stub, tmp_path: Path) -> None:
    archive = tar_of(write_peft(tmp_path / "sum", seed=61))
    digest = hashlib.sha256(archive).hexdigest()
    wrong = http.post(f"/v1/adapters?name=sum&sha256={'0' * 64}", content=archive)
    assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "sha256"
    assert http.post(f"/v1/adapters?name=sum&sha256={digest}", content=archive).status_code == 200
    info = pb.UploadAdapterRequest(info=pb.AdapterInfo(name="sum", sha256="1" * 64, pinned=True))
    with pytest.raises(grpc.RpcError) as refused:
        stub.UploadAdapter(iter([info, pb.UploadAdapterRequest(data=archive)]))
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    info.info.sha256 = digest
    assert stub.UploadAdapter(iter([info, pb.UploadAdapterRequest(data=archive)])).pinned


def test_a_download_says_which_version_it_is_and_how_long(http: httpx.Client, tmp_path: Path) -> None:
    http.post("/v1/adapters?name=tag", content=tar_of(write_peft(tmp_path / "tag", seed=71)))
    card = http.get("/v1/models/tag").json()
    content = http.get("/v1/adapters/tag/content")
    assert content.headers["etag"] == f'"{card["digest"]}"'
    assert int(content.headers["content-length"]) == len(content.content)
    again = http.get("/v1/adapters/tag@1/content", headers={"if-none-match": content.headers["etag"]})
    assert again.status_code == 304 and again.content == b""


def test_files_go_after_the_last_download(server: ServerThread, http, tmp_path: Path) -> None:
    source = write_peft(tmp_path / "slow", seed=81, rank=64)
    http.post("/v1/adapters?name=slow", content=tar_of(source))
    row = server.server.context.adapters.get("slow", key=None)
    folder = Path(row.version.path)
    chunks = server.server.context.adapters.archive(row)
    read = [server.call(anext(chunks))]
    assert (
        http.delete("/v1/models/slow").status_code == 200 and http.get("/v1/models/slow").status_code == 404
    )
    while (chunk := server.call(anext(chunks, b""))) != b"":
        assert folder.exists()
        read.append(chunk)
    wait_for(lambda: not folder.exists())
    with tarfile.open(fileobj=io.BytesIO(b"".join(read))) as tar:
        member = tar.extractfile("adapter_model.safetensors")
        assert member is not None and member.read() == (source / "adapter_model.safetensors").read_bytes()


def test_lists_can_be_read_in_pages(http: httpx.Client, adapter_root: Path) -> None:
    for number in range(3):
        load(http, f"page-{number}", write_peft(adapter_root / f"page{number}", seed=90 + number))
    whole = [f"{found['name']}@{found['version']}" for found in http.get("/v1/adapters").json()["data"]]
    paged, after = [], {}
    while True:
        body = http.get("/v1/adapters", params={"limit": 2, **after}).json()
        paged += [f"{found['name']}@{found['version']}" for found in body["data"]]
        if not body["has_more"]:
            break
        after = {"after": paged[-1]}
    assert paged == whole and len(whole) >= 3


def test_sglang_s_routes_answer_in_its_form(server: ServerThread, http, adapter_root: Path) -> None:
    source = write_peft(adapter_root / "sgl", seed=97)
    body = {"lora_name": "sgl", "lora_path": str(source), "pinned": True}
    made = http.post("/load_lora_adapter", json=body)
    assert made.status_code == 200 and made.json()["success"] and made.json()["error_message"] == ""
    assert made.json()["loaded_adapters"]["sgl"] == str(source)
    assert http.get("/v1/models/sgl").json()["digest"] in server.engine.pinned
    again = http.post("/load_lora_adapter", json=body)
    assert again.status_code == 400 and not again.json()["success"]
    assert "loaded already" in again.json()["error_message"] == again.json()["error"]["message"]
    gone = http.post("/unload_lora_adapter", json={"lora_name": "sgl"})
    assert gone.status_code == 200 and "sgl" not in gone.json()["loaded_adapters"]
    assert http.post("/unload_lora_adapter", json={"lora_name": "sgl"}).status_code == 404
    assert http.post("/unload_lora_adapter", json=[]).status_code == 400


def test_a_slow_load_of_one_name_holds_up_no_other(server: ServerThread, http, adapter_root: Path) -> None:
    gate, real = threading.Event(), server.engine.load_adapter

    async def slow(ref, pinned=False, job_id=""):  # type: ignore[no-untyped-def]
        if ref.name == "slow-load":
            while not gate.is_set():
                await asyncio.sleep(0.005)
        await real(ref, pinned, job_id)

    server.engine.load_adapter = slow
    answers: list[httpx.Response] = []
    source = write_peft(adapter_root / "slow-load", seed=95)
    thread = threading.Thread(target=lambda: answers.append(load(http, "slow-load", source)))
    try:
        thread.start()
        quick = write_peft(adapter_root / "quick", seed=96)
        with server.http() as other:
            assert load(other, "quick-load", quick).status_code == 200
            assert chat(other, "quick-load").status_code == 200
            assert chat(other, "slow-load").status_code == 404 and not answers
    finally:
        gate.set()
        thread.join(20)
        server.engine.load_adapter = real
    assert answers[0].status_code == 200 and chat(http, "slow-load").status_code == 200
