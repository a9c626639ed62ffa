"""Requests of every kind with words in them that must come out nowhere but in their answers."""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
from typing import Any

import grpc
import httpx

from coserve.server.grpc_gen import adapters_pb2 as pba
from coserve.server.grpc_gen import adapters_pb2_grpc, fine_tuning_pb2_grpc, inference_pb2_grpc
from coserve.server.grpc_gen import fine_tuning_pb2 as pbf
from coserve.server.grpc_gen import inference_pb2 as pbi

PROMPT = "sentinelprompt"
WRONG_KEY = "sentinelkeywrong"
ROWS = b"".join(
    json.dumps(
        {"messages": [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": f"{PROMPT} {n}"}]}
    ).encode()
    + b"\n"
    for n in range(8)
)
MESSAGES = [{"role": "system", "content": PROMPT}, {"role": "user", "content": PROMPT}]
TOOL = {
    "type": "function",
    "function": {"name": PROMPT, "description": PROMPT, "parameters": {"type": "object", "title": PROMPT}},
}
BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 2}),
    ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 2, "stream": True, "user": PROMPT}),
    ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 2, "stop": [PROMPT], "tools": [TOOL]}),
    ("/v1/chat/completions", {"messages": MESSAGES, "metadata": {PROMPT: PROMPT}, PROMPT: PROMPT}),
    ("/v1/chat/completions", {"messages": MESSAGES, "temperature": PROMPT}),
    ("/v1/chat/completions", {"messages": PROMPT}),
    ("/v1/chat/completions", {"messages": [{"role": PROMPT, "content": PROMPT}]}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": f"{PROMPT} " * 3000}]}),
    ("/v1/chat/completions", {"messages": MESSAGES, "model": f"{PROMPT}\n{PROMPT}"}),
    ("/v1/chat/completions", {"messages": MESSAGES, "chat_template": "{{ " + PROMPT}),
    (
        "/v1/chat/completions",
        {"messages": MESSAGES, "response_format": {"type": "json_schema", "json_schema": {"name": PROMPT}}},
    ),
    ("/v1/chat/completions", {"messages": MESSAGES, "structured_outputs": {"regex": f"({PROMPT}"}}),
    ("/v1/completions", {"prompt": PROMPT, "max_tokens": 2, "logprobs": 1}),
    ("/v1/completions", {"prompt": [PROMPT] * 2, "max_tokens": 2, "echo": True}),
    ("/v1/completions", {"prompt": PROMPT, "suffix": PROMPT}),
    ("/v1/responses", {"input": PROMPT, "instructions": PROMPT, "max_output_tokens": 16}),
    ("/v1/embeddings", {"input": PROMPT}),
    ("/tokenize", {"prompt": PROMPT}),
    ("/tokenize", {"messages": MESSAGES, PROMPT: 1}),
    ("/detokenize", {"tokens": [PROMPT]}),
    ("/v1/load_lora_adapter", {"lora_name": "n", "lora_path": f"/{PROMPT}/x"}),
    ("/v1/fine_tuning/jobs", {"training_file": "file-x", "suffix": PROMPT, "metadata": {"a": PROMPT}}),
    ("/v1/fine_tuning/jobs", {"training_file": "file-x", "lora": {"target_modules": [PROMPT]}}),
    ("/v1/fine_tuning/jobs", {"training_file": "file-x", PROMPT: PROMPT}),
]


def over_http(http: httpx.Client) -> list[httpx.Response]:
    """The answers to all of it; whatever is refused is refused in one."""
    answers = [http.post(path, json=body) for path, body in BODIES]
    for path, _ in BODIES[:1]:
        typed = {"content-type": "application/json"}
        answers.append(http.post(path, content=f'{{"messages": "{PROMPT}'.encode(), headers=typed))
        answers.append(http.post(path, content=PROMPT.encode(), headers={"content-type": f"x/{PROMPT}"}))
    for value in (f"Bearer {WRONG_KEY}", f"Basic {WRONG_KEY}", WRONG_KEY):
        answers.append(http.get("/v1/models", headers={"authorization": value}))
    answers.append(http.get(f"/v1/models?api_key={WRONG_KEY}&prompt={PROMPT}"))
    answers.append(http.get("/v1/files", params={"after": PROMPT, "limit": PROMPT}))
    form = {"purpose": "fine-tune"}
    answers.append(http.post("/v1/files", files={"file": (f"{PROMPT}.jsonl", ROWS)}, data=form))
    broken = b'{"messages": "' + PROMPT.encode() + b'"}\n' + PROMPT.encode()
    answers.append(http.post("/v1/files", files={"file": ("broken.jsonl", broken)}, data=form))
    answers.append(http.post("/v1/adapters", params={"name": "a"}, content=archive()))
    answers.append(http.post("/v1/adapters", params={"name": "a"}, content=PROMPT.encode()))
    return answers


def archive() -> bytes:
    """An adapter whose settings are wrong, in words that say so."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            info = tarfile.TarInfo(name)
            data = json.dumps({"peft_type": PROMPT, "target_modules": [PROMPT]}).encode()
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return packed.getvalue()


def over_grpc(channel: grpc.Channel, key: str) -> list[str]:
    """What refused calls say."""
    said = []
    inference = inference_pb2_grpc.InferenceServiceStub(channel)
    tuning = fine_tuning_pb2_grpc.FineTuningServiceStub(channel)
    adapters = adapters_pb2_grpc.AdapterServiceStub(channel)
    few = {"max_tokens": 2}
    for value in (f"Bearer {key}", f"Bearer {WRONG_KEY}", WRONG_KEY):
        meta = [("authorization", value)]
        calls = [
            lambda m: list(
                inference.Generate(pbi.GenerateRequest(prompt=PROMPT, sampling_params=few), metadata=m)
            ),
            lambda m: list(inference.Generate(pbi.GenerateRequest(prompt=PROMPT, model=PROMPT), metadata=m)),
            lambda m: list(inference.Generate(pbi.GenerateRequest(prompt=f"{PROMPT} " * 3000), metadata=m)),
            lambda m: tuning.PreviewDataset(pbf.PreviewDatasetRequest(data=ROWS), metadata=m),
            lambda m: tuning.PreviewDataset(pbf.PreviewDatasetRequest(data=PROMPT.encode()), metadata=m),
            lambda m: tuning.CreateJob(pbf.CreateJobRequest(training_file=PROMPT), metadata=m),
            lambda m: adapters.LoadAdapter(pba.LoadAdapterRequest(name="n", path=PROMPT), metadata=m),
        ]
        for call in calls:
            with contextlib.suppress(grpc.RpcError):
                try:
                    call(meta)
                except grpc.RpcError as error:
                    said.append(str(error.details()))
                    raise
    return said
