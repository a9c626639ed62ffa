"""Constrained answers of the demo model through the official client: what comes parses and validates."""

from __future__ import annotations

import asyncio
import json
import re
from enum import Enum
from typing import Literal

import grpc
import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field

from coserve.server.grpc_gen import inference_pb2, inference_pb2_grpc
from tests.faults.served import Served

ASK = [{"role": "user", "content": "Extract as JSON: Anna is 12 years old and lives in Rome."}]


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Place(BaseModel):
    city: str = Field(max_length=12)
    kind: Literal["town", "village"]


class Person(BaseModel):
    name: str = Field(max_length=12)
    age: int = Field(ge=0, le=150)
    colour: Colour
    home: Place | None
    tags: list[Colour] = Field(max_length=3)


def test_parse_gives_the_model_back(client: openai.OpenAI, served: Served) -> None:
    answer = client.chat.completions.parse(
        model=served.model, messages=ASK, response_format=Person, n=3, temperature=1.0, seed=1, max_tokens=400
    )
    people = [choice.message.parsed for choice in answer.choices]
    assert len(people) == 3 and all(isinstance(person, Person) for person in people)
    assert answer.usage is not None and answer.usage.completion_tokens > 0


def test_a_stream_is_the_same_text(client: openai.OpenAI, served: Served) -> None:
    asked = {"model": served.model, "messages": ASK, "max_tokens": 300, "temperature": 0.0}
    whole = client.chat.completions.parse(response_format=Place, **asked)
    with client.chat.completions.stream(response_format=Place, **asked) as stream:
        pieces = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert len(pieces) > 1 and "".join(pieces) == whole.choices[0].message.content
    assert final.choices[0].message.parsed == whole.choices[0].message.parsed
    assert isinstance(whole.choices[0].message.parsed, Place) and whole.choices[0].finish_reason == "stop"


def test_json_mode_gives_objects(client: openai.OpenAI, served: Served) -> None:
    for seed in range(4):
        answer = client.chat.completions.create(
            model=served.model,
            messages=ASK,
            response_format={"type": "json_object"},
            seed=seed,
            temperature=0.7,
            max_tokens=400,
        )
        choice = answer.choices[0]
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content or ""), dict)
        assert not re.search(r"\s{42}", choice.message.content or "")


SCHEMAS = [
    {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "minItems": 2, "maxItems": 4},
    {"enum": ["a", 1, None, {"x": []}]},
    {"type": "string", "pattern": "^[A-Z][a-z]{1,5}$"},
    {"type": "string", "format": "date"},
    {"anyOf": [{"const": "no"}, {"type": "object", "properties": {"n": {"type": "null"}}, "required": ["n"],
                                 "additionalProperties": False}]},
    {"$defs": {"t": {"type": "object", "properties": {"v": {"type": "boolean"}}, "required": ["v"],
                     "additionalProperties": False}}, "$ref": "#/$defs/t"},
]  # fmt: skip


def test_answers_to_schemas_side_by_side_are_valid(served: Served) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
            calls = [
                client.chat.completions.create(
                    model=served.model,
                    messages=ASK,
                    max_tokens=200,
                    temperature=1.2,
                    seed=seed,
                    response_format={
                        "type": "json_schema",
                        "json_schema": {"name": "s", "schema": schema, "strict": True},
                    },
                )
                for schema in SCHEMAS
                for seed in range(3)
            ]
            answers = await asyncio.gather(*calls)
        assert {answer.choices[0].finish_reason for answer in answers} == {"stop"}
        return [answer.choices[0].message.content or "" for answer in answers]

    for place, text in enumerate(asyncio.run(ask())):
        jsonschema.validate(json.loads(text), SCHEMAS[place // 3])


KINDS = [
    ({"regex": r"\d{3}-[a-z]+"}, r"\d{3}-[a-z]+"),
    ({"choice": ["positive", "negative"]}, "positive|negative"),
    ({"grammar": 'start: "<" WORD ">"\nWORD: /[a-z]{2,6}/'}, "<[a-z]{2,6}>"),
]


@pytest.mark.parametrize(("kind", "pattern"), KINDS, ids=[next(iter(kind)) for kind, _ in KINDS])
def test_vllms_kinds_over_http_and_grpc(
    client: openai.OpenAI, served: Served, kind: dict, pattern: str
) -> None:
    body = {"structured_outputs": kind, "stop_token_ids": []}
    answer = client.completions.create(
        model=served.model, prompt="The answer is", max_tokens=60, temperature=0.0, extra_body=body
    )
    text = answer.choices[0].text
    if answer.choices[0].finish_reason == "stop":
        assert re.fullmatch(pattern, text)
    params = inference_pb2.SamplingParams(max_tokens=60, temperature=0.0, **kind)
    request = inference_pb2.GenerateRequest(
        model=served.model, prompt="The answer is", sampling_params=params
    )
    with grpc.insecure_channel(served.grpc) as channel:
        pieces = list(inference_pb2_grpc.InferenceServiceStub(channel).Generate(request, timeout=60))
    assert "".join(piece.text for piece in pieces) == text and re.fullmatch(f"({pattern})|.{{60,}}", text)


def test_a_bad_schema_is_a_bad_request(client: openai.OpenAI, served: Served) -> None:
    described = {"name": "s", "schema": {"type": "object", "patternProperties": {"(?=x)": {}}}}
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as raised:
            client.chat.completions.create(
                model=served.model,
                messages=ASK,
                stream=stream,
                response_format={"type": "json_schema", "json_schema": described},
            )
        assert raised.value.param == "response_format.json_schema.schema"
