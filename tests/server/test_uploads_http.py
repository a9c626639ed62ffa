"""Files in parts, and files that expire, through the official client."""

from __future__ import annotations

import hashlib
import sqlite3

import httpx
import openai
import pytest

from tests.server.running import BASE, ServerThread
from tests.server.test_fine_tuning_http import DATA, until_over


def test_a_file_in_parts_trains_a_job(server: ServerThread) -> None:
    client = server.openai()
    upload = client.uploads.upload_file_chunked(
        file=DATA,
        filename="big.jsonl",
        bytes=len(DATA),
        mime_type="text/jsonl",
        purpose="fine-tune",
        part_size=700,
        md5=hashlib.md5(DATA).hexdigest(),
    )
    assert upload.status == "completed" and upload.bytes == len(DATA) and upload.file is not None
    assert client.files.content(upload.file.id).read() == DATA and upload.file.filename == "big.jsonl"
    job = client.fine_tuning.jobs.create(model=BASE, training_file=upload.file.id)
    assert until_over(client, job.id).status == "succeeded"
    assert not any(server.server.context.uploads.folder.iterdir())


def begin(client: openai.OpenAI, size: int = 6) -> openai.types.Upload:
    return client.uploads.create(
        bytes=size, filename="a.jsonl", mime_type="text/jsonl", purpose="fine-tune"
    )


def test_parts_in_the_order_given(server: ServerThread) -> None:
    client = server.openai()
    upload = begin(client)
    second = client.uploads.parts.create(upload.id, data=b"def").id
    first = client.uploads.parts.create(upload.id, data=b"abc").id
    done = client.uploads.complete(upload.id, part_ids=[first, second])
    assert done.file is not None and client.files.content(done.file.id).read() == b"abcdef"


def test_what_can_not_be_completed(server: ServerThread, http: httpx.Client) -> None:
    client = server.openai()
    upload = begin(client)
    part = client.uploads.parts.create(upload.id, data=b"abc").id
    for names, md5, param in (
        ([part], "", "part_ids"),
        ([part, part], "", "part_ids"),
        ([part, "part_x"], "", "part_ids"),
        ([], "", "part_ids"),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            client.uploads.complete(upload.id, part_ids=names, md5=md5)
        assert refused.value.param == param
    other = client.uploads.parts.create(upload.id, data=b"def").id
    with pytest.raises(openai.BadRequestError) as wrong:
        client.uploads.complete(upload.id, part_ids=[part, other], md5="0" * 32)
    assert wrong.value.param == "md5"
    assert client.uploads.cancel(upload.id).status == "cancelled"
    for action in (
        lambda: client.uploads.parts.create(upload.id, data=b"x"),
        lambda: client.uploads.complete(upload.id, part_ids=[part, other]),
        lambda: client.uploads.cancel(upload.id),
    ):
        with pytest.raises(openai.BadRequestError) as over:
            action()
        assert over.value.code == "failed_precondition"
    with pytest.raises(openai.NotFoundError):
        client.uploads.cancel("upload_none")
    assert http.post("/v1/uploads", json={"bytes": 0}).status_code == 400
    body = {"bytes": 2**40, "filename": "a", "mime_type": "b", "purpose": "fine-tune"}
    assert http.post("/v1/uploads", json=body).json()["error"]["param"] == "bytes"


def database(server: ServerThread) -> sqlite3.Connection:
    return sqlite3.connect(f"{server.config.state_dir}/coserve.sqlite", isolation_level=None)


def test_an_upload_ends_with_its_hour(server: ServerThread) -> None:
    client = server.openai()
    upload = begin(client)
    assert upload.expires_at == upload.created_at + 3600
    with database(server) as db:
        db.execute("UPDATE uploads SET expires_at = 1 WHERE id = ?", (upload.id,))
    with pytest.raises(openai.BadRequestError) as over:
        client.uploads.parts.create(upload.id, data=b"abc")
    assert "expired" in over.value.message
    begin(client)
    assert not (server.server.context.uploads.folder / upload.id).exists()


def test_files_expire(server: ServerThread, http: httpx.Client) -> None:
    client = server.openai()
    expiry = {"anchor": "created_at", "seconds": 7200}
    file = client.files.create(file=("a.jsonl", DATA), purpose="fine-tune", expires_after=expiry)  # type: ignore[arg-type]
    assert file.expires_at == file.created_at + 7200
    path = server.server.context.files.path(file.id)
    assert path.exists()
    with database(server) as db:
        db.execute("UPDATE files SET expires_at = 1 WHERE id = ?", (file.id,))
    assert file.id not in [found.id for found in client.files.list()] and not path.exists()
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)
    for name, bad in (("seconds", 60), ("anchor", "now")):
        fields = {f"expires_after[{key}]": value for key, value in {**expiry, name: bad}.items()}
        answer = http.post(
            "/v1/files", files={"file": ("a", b"x")}, data={"purpose": "fine-tune", **fields}
        )
        assert answer.status_code == 400 and answer.json()["error"]["param"] == f"expires_after.{name}"
