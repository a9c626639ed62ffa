"""Every answer of the fine-tuning API against OpenAI's own description of it."""

from __future__ import annotations

import httpx
import pytest

from tests.server.openai_schema import FILE, Schemas
from tests.server.running import BASE, ServerThread
from tests.server.test_fine_tuning_http import DATA, until_over

pytestmark = pytest.mark.skipif(not FILE.exists(), reason="OpenAI's schemas are not beside the checkout")


@pytest.fixture(scope="module")
def schemas() -> Schemas:
    return Schemas()


def test_the_checker_finds_what_is_wrong(schemas: Schemas) -> None:
    good = {"id": "e", "object": "fine_tuning.job.event", "created_at": 1, "level": "info", "message": ""}
    schemas.check("FineTuningJobEvent", good)
    for bad in ({"level": "loud"}, {"created_at": "now"}, {"data": 5}, {"created_at": True}):
        with pytest.raises(AssertionError):
            schemas.check("FineTuningJobEvent", {**good, **bad})
    with pytest.raises(AssertionError, match="message is missing"):
        schemas.check("FineTuningJobEvent", {k: v for k, v in good.items() if k != "message"})


def test_files(http: httpx.Client, schemas: Schemas) -> None:
    form = {"purpose": "fine-tune", "expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
    file = http.post("/v1/files", files={"file": ("a.jsonl", DATA)}, data=form).json()
    schemas.check("OpenAIFile", file)
    schemas.check("OpenAIFile", http.get(f"/v1/files/{file['id']}").json())
    schemas.check("ListFilesResponse", http.get("/v1/files").json())
    schemas.check("DeleteFileResponse", http.delete(f"/v1/files/{file['id']}").json())
    schemas.check("ErrorResponse", http.get(f"/v1/files/{file['id']}").json())


@pytest.mark.parametrize("outcome", ["succeeded", "failed", "cancelled"])
def test_jobs(server: ServerThread, http: httpx.Client, schemas: Schemas, outcome: str) -> None:
    server.engine.auto_train = outcome == "succeeded"
    data = b"nonsense" if outcome == "failed" else DATA
    form = {"purpose": "fine-tune"}
    file = http.post("/v1/files", files={"file": ("a.jsonl", data)}, data=form).json()["id"]
    hyperparameters = {"n_epochs": "auto", "batch_size": 4, "learning_rate_multiplier": "auto"}
    body = {
        "model": BASE,
        "training_file": file,
        "suffix": "x",
        "metadata": {"a": "b"},
        "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
    }
    schemas.check("CreateFineTuningJobRequest", body)
    made = http.post("/v1/fine_tuning/jobs", json=body).json()
    schemas.check("FineTuningJob", made)
    url = f"/v1/fine_tuning/jobs/{made['id']}"
    if outcome == "cancelled":
        schemas.check("FineTuningJob", http.post(f"{url}/cancel").json())
    assert until_over(server.openai(), made["id"]).status == outcome
    schemas.check("FineTuningJob", http.get(url).json())
    schemas.check("ListPaginatedFineTuningJobsResponse", http.get("/v1/fine_tuning/jobs").json())
    events = http.get(f"{url}/events").json()
    schemas.check("ListFineTuningJobEventsResponse", events)
    assert events["data"]
    checkpoints = http.get(f"{url}/checkpoints").json()
    schemas.check("ListFineTuningJobCheckpointsResponse", checkpoints)
    assert bool(checkpoints["data"]) == (outcome == "succeeded")
    if outcome == "succeeded":
        name = http.get(url).json()["fine_tuned_model"]
        schemas.check("ListModelsResponse", http.get("/v1/models").json())
        schemas.check("DeleteModelResponse", http.delete(f"/v1/models/{name}").json())


REFUSED = [
    ("GET", "/v1/fine_tuning/checkpoints/c/permissions", "permissions"),
    ("POST", "/v1/fine_tuning/checkpoints/c/permissions", "permissions"),
    ("DELETE", "/v1/fine_tuning/checkpoints/c/permissions/p", "permissions"),
    ("POST", "/v1/fine_tuning/alpha/graders/run", "Graders"),
    ("POST", "/v1/fine_tuning/alpha/graders/validate", "Graders"),
]


@pytest.mark.parametrize(("method", "path", "what"), REFUSED, ids=[row[1][16:] + row[0] for row in REFUSED])
def test_what_this_server_has_not_is_refused_by_name(
    http: httpx.Client, schemas: Schemas, method: str, path: str, what: str
) -> None:
    answer = http.request(method, path, json={})
    assert answer.status_code == 400
    schemas.check("ErrorResponse", answer.json())
    assert answer.json()["error"]["code"] == "unsupported" and what in answer.json()["error"]["message"]
