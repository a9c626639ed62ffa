"""Upstream defects of adapters, held against a whole server."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from coserve.config import EngineConfig
from tests.defects import scrape
from tests.faults.served import Served
from tests.server.running import ServerThread

Load = Callable[..., httpx.Response]
PROMPT = "Sort these numbers: 9, 2, 5, 31, 4, 18, 7, 26."


def names(served: Served) -> set[str]:
    return {model["id"] for model in served.http.get("/v1/models").json()["data"]}


def completion(served: Served, model: str, **fields: object) -> httpx.Response:
    body = {"model": model, "prompt": PROMPT, "max_tokens": 24, "temperature": 0, "ignore_eos": True}
    return served.http.post("/v1/completions", json=body | fields)


def text(served: Served, model: str) -> str:
    answer = completion(served, model)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def test_a_name_with_new_weights_answers_as_from_a_cold_cache(served: Served, load: Load) -> None:
    """vllm#42125: after a reload of a name the prefix cache still had the old weights' KV."""
    assert load("swap", "one").status_code == 200
    before = [text(served, "swap") for _ in range(2)]
    assert load("swap", "two", load_inplace=True).status_code == 200
    after = [text(served, "swap") for _ in range(2)]
    assert load("cold", "three").status_code == 200 and load("colder", "two").status_code == 200
    assert before[0] == before[1] != after[0] == after[1] == text(served, "colder")


def test_nothing_is_read_from_the_disk_after_a_load_in_place(served: Served, load: Load) -> None:
    """vllm#36373: each request after an in-place load read the adapter's files again."""
    assert load("inplace", "one").status_code == 200
    assert load("inplace", "two", load_inplace=True).status_code == 200
    expected = text(served, "inplace")
    folder = served.state_dir / "adapters" / "inplace"
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert files
    for file in files:
        file.rename(file.with_suffix(".away"))
    assert [text(served, "inplace") for _ in range(3)] == [expected] * 3
    for file in files:
        file.with_suffix(".away").rename(file)


def broken(kind: str, root: Path) -> Path:
    folder = root / f"broken-{kind}"
    shutil.copytree(root / "one", folder, dirs_exist_ok=True)
    tensors, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    settings = json.loads(config.read_text())
    if kind == "no weights":
        tensors.unlink()
    elif kind == "cut short":
        tensors.write_bytes(tensors.read_bytes()[:-100])
    elif kind == "no json":
        config.write_text("{")
    elif kind == "no files":
        shutil.rmtree(folder)
    else:
        config.write_text(json.dumps(settings | {"no module": {"target_modules": "nothing"}}.get(kind, {})))
        if kind == "modules_to_save":
            config.write_text(json.dumps(settings | {"modules_to_save": ["embed_tokens"]}))
    return folder


@pytest.mark.parametrize(
    ("kind", "status", "word"),
    [
        ("no weights", 400, "adapter_model.safetensors"),
        ("cut short", 400, ""),
        ("no json", 400, "adapter_config.json"),
        ("no files", 404, ""),
        ("no module", 400, "match no linear layer"),
        ("modules_to_save", 400, "modules_to_save"),
    ],
)
def test_an_adapter_that_cannot_be_served_is_refused_at_its_load(
    served: Served, load: Load, peft_root: Path, kind: str, status: int, word: str
) -> None:
    """vllm#11702: a broken adapter's load took the server down or left its name. vllm#55193, vllm#34186,
    vllm#48019: one without modules that match was taken for the base. vllm#9280: modules_to_save came up with
    the first request."""
    refused = load("broken", broken(kind, peft_root).name)
    assert refused.status_code == status, refused.text
    assert word in refused.json()["error"]["message"]
    assert "broken" not in names(served)
    assert completion(served, "broken").status_code == 404
    assert text(served, served.model)


def test_a_load_during_generation_neither_stops_nor_changes_it(served: Served, load: Load) -> None:
    """vllm#13698: a load while requests ran stopped or stalled them. vllm#47724: they went on with another
    user's adapter."""
    assert load("steady", "one").status_code == 200
    body = {"model": "steady", "prompt": PROMPT, "max_tokens": 400, "temperature": 0, "ignore_eos": True}
    quiet = served.http.post("/v1/completions", json=body).json()["choices"][0]["text"]
    pieces, loads = [], iter(("two", "three", "two"))
    with served.http.stream("POST", "/v1/completions", json=body | {"stream": True}) as stream:
        for line in stream.iter_lines():
            if line.startswith("data: {"):
                pieces.append(json.loads(line[6:])["choices"][0]["text"])
                source = next(loads, None)
                if source is not None:
                    assert load(f"late-{len(pieces)}", source).status_code == 200
    assert "".join(pieces) == quiet and len(pieces) > 10
    assert len({text(served, f"late-{n}") for n in (1, 2)}) == 2


def test_a_loaded_adapter_changes_logits(served: Served, load: Load) -> None:
    """vllm#41754: an adapter was loaded, listed, and without any effect."""
    assert load("probe", "one").status_code == 200
    found = []
    for model in (served.model, "probe"):
        scored = completion(served, model, max_tokens=0, echo=True, logprobs=1).json()["choices"][0]
        found.append(scored["logprobs"]["token_logprobs"][1:])
    assert len(found[0]) == len(found[1]) > 10
    assert sum(abs(a - b) > 1e-3 for a, b in zip(*found, strict=True)) > len(found[0]) / 2


def test_an_unknown_adapter_is_never_the_base(served: Served, load: Load) -> None:
    """text-generation-inference#2505: a request for an adapter that wasn't there got the base's answer."""
    assert load("known", "one").status_code == 200
    messages = [{"role": "user", "content": PROMPT}]
    for model in ("unknown", "known@7", "known:", f"{served.model}:known", "KNOWN"):
        for path, body in (
            ("/v1/completions", {"prompt": PROMPT}),
            ("/v1/chat/completions", {"messages": messages}),
            ("/v1/chat/completions", {"messages": messages, "stream": True}),
        ):
            answer = served.http.post(path, json={"model": model, "max_tokens": 4, **body})
            assert answer.status_code == 404, (model, answer.text)
            assert answer.json()["error"]["code"] == "model_not_found"
    served.http.delete("/v1/models/known")
    assert completion(served, "known").status_code == 404


def test_unload_returns_after_many_samples_at_once(served: Served, load: Load) -> None:
    """sglang#36894: a request of n=16 left the adapter's counter above 0, so an unload waited for ever."""
    assert load("many", "one").status_code == 200
    answer = completion(served, "many", n=16, temperature=1.0, max_tokens=8)
    assert len(answer.json()["choices"]) == 16
    with served.http.stream(
        "POST",
        "/v1/completions",
        json={
            "model": "many",
            "prompt": PROMPT,
            "n": 16,
            "max_tokens": 400,
            "ignore_eos": True,
            "stream": True,
        },
    ) as stream:
        next(stream.iter_lines())
    gone = served.http.post("/v1/unload_lora_adapter", json={"lora_name": "many"}, timeout=30)
    assert gone.status_code == 200 and "many" not in names(served)
    folder = served.state_dir / "adapters" / "many"
    served.wait(lambda: not folder.exists())  # files go with the last request that may read them


def test_a_colon_in_a_name_separates_nothing(tmp_path: Path) -> None:
    """sglang#12745: the base's name was cut at its colon, and the rest taken for an adapter's."""
    config = EngineConfig(model="", served_model_name="org:base:v1")
    server = ServerThread(tmp_path / "s", engine=config)
    try:
        with server.http() as http:
            for model, status in (
                ("org:base:v1", 200),
                ("org", 404),
                ("org:base", 404),
                ("org:base:v1:x", 404),
            ):
                answer = http.post("/v1/completions", json={"model": model, "prompt": "a"})
                assert answer.status_code == status, model
            assert [add.adapter for add in server.engine.requests] == [None]
    finally:
        server.stop()


def test_each_call_for_an_adapter_ends_when_its_requests_are_ended(served: Served, load: Load) -> None:
    """sglang#29179: calls whose requests for an adapter were aborted hung until the client's own timeout."""
    assert load("cut", "one").status_code == 200
    body = {"model": "cut", "prompt": PROMPT, "max_tokens": 1500, "ignore_eos": True}

    def call(stream: bool) -> tuple[int, str]:
        answer = served.http.post("/v1/completions", json=body | {"stream": stream})
        return answer.status_code, answer.text

    with ThreadPoolExecutor(6) as pool:
        calls = [pool.submit(call, bool(number % 2)) for number in range(6)]
        served.wait(lambda: scrape.value(served.http, "vllm:num_requests_running") == len(calls))
        served.kill_engine()
        ends = [future.result(60) for future in calls]
    for number, (status, said) in enumerate(ends):
        if number % 2:
            assert status == 200 and said.endswith("data: [DONE]\n\n") and '"error"' in said
        else:
            assert status == 503 and json.loads(said)["error"]["code"] == "service_unavailable"
    served.wait(lambda: served.http.get("/ready").status_code == 200)
    assert text(served, "cut")
