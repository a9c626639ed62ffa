"""The official clients against a real server with the demo model: OpenAI's package and gRPC's stubs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import grpc
import openai
import pytest

from coserve.server.grpc_gen import fine_tuning_pb2 as tuning_pb
from coserve.server.grpc_gen import fine_tuning_pb2_grpc, inference_pb2_grpc
from coserve.server.grpc_gen import inference_pb2 as inference_pb
from tests.faults.served import Served

QUESTION = [{"role": "user", "content": "What is 7 + 5?"}]
ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"What is {i} + {i % 7}?"},
            {"role": "assistant", "content": f"Aye, captain! {i + i % 7}."},
        ]
    }
    for i in range(48)
]
DATA = "\n".join(json.dumps(row) for row in ROWS).encode()


def test_streamed_and_whole_answers_agree(client: openai.OpenAI, served: Served) -> None:
    whole = client.chat.completions.create(model=served.model, messages=QUESTION, temperature=0)
    chunks = list(
        client.chat.completions.create(
            model=served.model,
            messages=QUESTION,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content and re.search(r"\b12\b", text)
    assert chunks[-1].usage == whole.usage and whole.choices[0].finish_reason == "stop"


def test_seeded_samples_repeat(client: openai.OpenAI, served: Served) -> None:
    def sample() -> list[str]:
        answer = client.chat.completions.create(
            model=served.model, messages=QUESTION, temperature=1.5, seed=5, n=3, max_tokens=12
        )
        return [choice.message.content or "" for choice in answer.choices]

    assert sample() == sample()


def test_completions_score_what_they_made(client: openai.OpenAI, served: Served) -> None:
    made = client.completions.create(
        model=served.model,
        prompt="Once",
        max_tokens=8,
        temperature=0,
        logprobs=1,
        extra_body={"ignore_eos": True},
    )
    block = made.choices[0].logprobs
    assert block is not None and len(block.tokens or []) == 8
    scored = client.completions.create(
        model=served.model, prompt="Once" + made.choices[0].text, max_tokens=0, echo=True, logprobs=1
    )
    again = scored.choices[0].logprobs
    assert again is not None and again.tokens is not None and scored.usage is not None
    assert scored.usage.completion_tokens == 0 and scored.choices[0].text == "Once" + made.choices[0].text
    if again.tokens[1:] == block.tokens:
        assert again.token_logprobs[1:] == pytest.approx(block.token_logprobs, abs=1e-4)  # type: ignore[index]


def test_errors_have_their_classes(client: openai.OpenAI, served: Served) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="nobody", messages=QUESTION)
    assert unknown.value.code == "model_not_found" and unknown.value.param == "model"
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model=served.model, messages=QUESTION, max_tokens=10**6)
    assert long.value.code == "context_length_exceeded"


def test_fine_tune_over_grpc_and_chat_with_it(client: openai.OpenAI, served: Served) -> None:
    with grpc.insecure_channel(served.grpc) as channel:
        stub = fine_tuning_pb2_grpc.FineTuningServiceStub(channel)
        info = tuning_pb.UploadFileRequest(info=tuning_pb.FileInfo(filename="t.jsonl", purpose="fine-tune"))
        file = stub.UploadFile(iter([info, tuning_pb.UploadFileRequest(data=DATA)]))
        training = tuning_pb.TrainingConfig(n_epochs=6, learning_rate=2e-3, batch_size=8)
        job = stub.CreateJob(
            tuning_pb.CreateJobRequest(training_file=file.id, adapter="captain", seed=1, training=training)
        )
        events = list(stub.WatchJob(tuning_pb.WatchJobRequest(job_id=job.id), timeout=120))
        assert [event.step for event in events if event.type == "metrics"] == list(range(1, 37))
        assert events[-1].status == "succeeded", events[-1].message
        generate = inference_pb2_grpc.InferenceServiceStub(channel).Generate
        params = inference_pb.SamplingParams(temperature=0, max_tokens=24)
        message = inference_pb.ChatMessage(role="user", content=QUESTION[0]["content"])
        request = inference_pb.GenerateRequest(model="captain", messages=[message], sampling_params=params)
        over_grpc = "".join(part.text for part in generate(request))
    answer = client.chat.completions.create(model="captain", messages=QUESTION, temperature=0, max_tokens=24)
    base = client.chat.completions.create(model=served.model, messages=QUESTION, temperature=0, max_tokens=24)
    assert answer.choices[0].message.content == over_grpc and over_grpc.startswith("Aye, captain!")
    assert "captain" not in (base.choices[0].message.content or "")


def test_reload_of_a_download_answers_alike(client: openai.OpenAI, served: Served, tmp_path: Path) -> None:
    """Runs after the fine-tune: its adapter goes out as a tar and comes back under another name."""
    if served.http.get("/v1/models/captain").status_code == 404:
        test_fine_tune_over_grpc_and_chat_with_it(client, served)
    tar = served.http.get("/v1/adapters/captain/content").content
    body = served.http.post("/v1/adapters?name=twin", content=tar).json()
    assert body["digest"] == served.http.get("/v1/models/captain").json()["digest"]
    assert served.chat("What is 9 + 4?", "twin") == served.chat("What is 9 + 4?", "captain")
    served.http.delete("/v1/models/captain").raise_for_status()
    assert served.chat("What is 9 + 4?", "twin").startswith("Aye, captain!")
