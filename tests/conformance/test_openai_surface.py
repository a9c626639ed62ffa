"""The official Python client over the surface, on a real server: fields, streams, responses, files."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
from typing import Literal

import httpx
import openai
import pytest
from pydantic import BaseModel

from coserve.config import DEMO_MODEL_DIR
from coserve.tokenizer import Tokenizer
from tests.faults.served import Served

QUESTION = [{"role": "user", "content": "What is 7 + 5?"}]
ASKED = [{"role": "user", "content": "What is the weather in Paris?"}]
WEATHER = {
    "name": "get_weather",
    "description": "Current weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
TOOLS = [{"type": "function", "function": WEATHER}]
TOKENIZER = Tokenizer.from_dir(DEMO_MODEL_DIR)


@pytest.fixture
def how(served: Served) -> dict:
    return {"model": served.model, "messages": QUESTION, "temperature": 0, "max_tokens": 24}


# ------------------------------------------------------------------ fields


def test_models(client: openai.OpenAI, served: Served) -> None:
    assert served.model in [card.id for card in client.models.list()]
    assert client.models.retrieve(served.model).owned_by == "coserve"


def test_request_ids(client: openai.OpenAI, how: dict) -> None:
    raw = client.chat.completions.with_raw_response.create(**how, extra_headers={"X-Request-Id": "mine"})
    assert raw.headers["x-request-id"] == "mine" and raw.parse().id == "chatcmpl-mine"
    assert client.chat.completions.create(**how)._request_id


def test_sampled_answers_by_every_setting(client: openai.OpenAI, how: dict) -> None:
    asked = [{"role": "user", "content": "Tell me about yourself and the sea."}]
    sampled = {**how, "messages": asked, "temperature": 2, "seed": 9, "n": 4}
    plain = client.chat.completions.create(**sampled)
    assert len({choice.message.content for choice in plain.choices}) > 1
    for fields in (
        {"top_p": 0.01},
        {"extra_body": {"top_k": 1}},
        {"extra_body": {"min_p": 1.0}},
        {"temperature": 0},
    ):
        same = client.chat.completions.create(**{**sampled, **fields})
        assert len({choice.message.content for choice in same.choices}) == 1, fields


def test_bias_bans_and_what_is_allowed(client: openai.OpenAI, how: dict) -> None:
    def text(**fields: object) -> str:
        return (
            client.chat.completions.create(**{**how, "extra_body": fields}).choices[0].message.content or ""
        )

    plain = text()
    assert "12" in plain
    one = TOKENIZER.encode("1", add_special_tokens=False)[0]
    assert "1" not in text(logit_bias={str(one): -100})
    assert "12" not in text(bad_words=["12"]) and text(bad_words=["zzz"]) == plain
    assert set(text(allowed_token_ids=[one], max_tokens=5)) == {"1"}
    assert text(stop=["12"]) == plain.split("12")[0]
    assert text(stop=["12"], include_stop_str_in_output=True).endswith("12")
    assert len(TOKENIZER.encode(text(min_tokens=20, ignore_eos=True))) >= 20


def test_log_probabilities_of_all_and_of_named_tokens(client: openai.OpenAI, how: dict) -> None:
    first = {**how, "max_tokens": 1, "logprobs": True}
    everything = client.chat.completions.create(**first, top_logprobs=-1)
    assert everything.choices[0].logprobs is not None and everything.choices[0].logprobs.content is not None
    entry = everything.choices[0].logprobs.content[0]
    assert sum(math.exp(item.logprob) for item in entry.top_logprobs) == pytest.approx(1, abs=1e-4)
    assert entry.top_logprobs[0].logprob == entry.logprob
    ids = [5, 900, 77]
    named = client.chat.completions.create(**first, extra_body={"logprob_token_ids": ids})
    named_by_id = client.chat.completions.create(
        **first, extra_body={"logprob_token_ids": ids, "return_tokens_as_token_ids": True}
    )
    assert named.choices[0].logprobs is not None and named_by_id.choices[0].logprobs is not None
    (found,), (by_id,) = (
        named.choices[0].logprobs.content or (),
        named_by_id.choices[0].logprobs.content or (),
    )
    assert [item.token for item in by_id.top_logprobs] == [f"token_id:{number}" for number in ids]
    assert [item.bytes for item in found.top_logprobs] == [list(TOKENIZER.token_bytes(n)) for n in ids]
    values = sorted(item.logprob for item in entry.top_logprobs)
    for item in found.top_logprobs:
        assert min(abs(item.logprob - value) for value in values) < 1e-4


def test_a_salt_keeps_the_cache_to_itself(client: openai.OpenAI, how: dict) -> None:
    long = [{"role": "user", "content": "Remember: " + "blue green " * 60}]

    def cached(salt: str | None) -> int:
        body = {"cache_salt": salt} if salt else {}
        usage = client.chat.completions.create(**{**how, "messages": long}, extra_body=body).usage
        assert usage is not None and usage.prompt_tokens_details is not None
        return usage.prompt_tokens_details.cached_tokens or 0

    assert [cached(salt) > 0 for salt in (None, None, "a", "a", "b", None)] == [
        False, True, False, True, False, True,
    ]  # fmt: skip


def test_cached_tokens_count_each_prompt_once(client: openai.OpenAI, served: Served) -> None:
    prompts = [f"{number} " + "red white " * 40 for number in (1, 2)]

    def cached() -> int:
        made = client.completions.create(model=served.model, prompt=prompts, n=2, max_tokens=1, temperature=0)
        assert made.usage is not None and made.usage.prompt_tokens_details is not None
        return made.usage.prompt_tokens_details.cached_tokens or 0

    cached()
    lengths = [len(TOKENIZER.encode(prompt)) for prompt in prompts]
    assert cached() == sum((length - 1) // 16 * 16 for length in lengths)


def test_prompts_as_text_ids_and_batches(client: openai.OpenAI, served: Served) -> None:
    ids = TOKENIZER.encode("Once upon")
    made = [
        client.completions.create(model=served.model, prompt=prompt, max_tokens=4, temperature=0)
        for prompt in ("Once upon", ids, ["Once upon", "Twice"], [ids, ids])
    ]
    assert [len(answer.choices) for answer in made] == [1, 1, 2, 2]
    assert len({answer.choices[0].text for answer in made}) == 1
    cut = client.completions.create(
        model=served.model,
        prompt=ids,
        max_tokens=2,
        extra_body={"truncate_prompt_tokens": 1, "return_token_ids": True},
    )
    assert cut.choices[0].prompt_token_ids == ids[-1:]  # type: ignore[attr-defined]


def test_two_hundred_prompts_and_128_answers(client: openai.OpenAI, served: Served) -> None:
    many = client.completions.create(model=served.model, prompt=["a"] * 200, max_tokens=1, temperature=0)
    assert [choice.index for choice in many.choices] == list(range(200))
    wide = client.completions.create(model=served.model, prompt="a", max_tokens=1, n=128, seed=1)
    assert len(wide.choices) == 128 and wide.usage is not None and wide.usage.completion_tokens == 128


# ------------------------------------------------------------------ streams


def test_each_choice_s_chunks_come_in_order(client: openai.OpenAI, how: dict) -> None:
    chunks = list(
        client.chat.completions.create(
            **{**how, "temperature": 1.0, "seed": 2},
            n=3,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert all(chunk.usage is None for chunk in chunks[:-1])
    for index in range(3):
        own = [chunk.choices[0] for chunk in chunks[:-1] if chunk.choices[0].index == index]
        assert own[0].delta.role == "assistant" and own[0].delta.content == ""
        assert [choice.finish_reason is None for choice in own] == [True] * (len(own) - 1) + [False]
        assert all(choice.delta.role is None for choice in own[1:])


def test_the_streaming_helper(client: openai.OpenAI, how: dict) -> None:
    with client.chat.completions.stream(**how) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
        assert text == stream.get_final_completion().choices[0].message.content


@pytest.mark.parametrize("interval", [2, 7])
def test_larger_chunks_say_the_same(client: openai.OpenAI, how: dict, interval: int) -> None:
    def stream(**extra: object) -> list[str]:
        body = {**how, "max_tokens": 40, "extra_body": {"ignore_eos": True, **extra}}
        chunks = list(client.chat.completions.create(**body, stream=True))
        return [text for chunk in chunks if (text := chunk.choices[0].delta.content)]

    plain, joined = stream(), stream(stream_interval=interval)
    assert "".join(plain) == "".join(joined) and len(joined) <= len(plain) // interval + 3


def test_tools_streamed_and_whole_agree(client: openai.OpenAI, how: dict) -> None:
    body = {**how, "messages": ASKED, "tools": TOOLS, "max_tokens": 60}
    (call,) = client.chat.completions.create(**body).choices[0].message.tool_calls or ()
    with client.chat.completions.stream(**body) as stream:
        for _ in stream:
            pass
        (streamed,) = stream.get_final_completion().choices[0].message.tool_calls or ()
    assert call.type == streamed.type == "function"
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    assert streamed.function.arguments == call.function.arguments


class Sum(BaseModel):
    """What parse() asks for."""

    sum: int
    parity: Literal["odd", "even"]


def test_parsed_answers(client: openai.OpenAI, served: Served, how: dict) -> None:
    body = {**how, "max_tokens": 60}
    whole = client.chat.completions.parse(**body, response_format=Sum).choices[0].message.parsed
    with client.chat.completions.stream(**body, response_format=Sum) as stream:
        for _ in stream:
            pass
        streamed = stream.get_final_completion().choices[0].message.parsed
    assert isinstance(whole, Sum) and streamed == whole
    asked = {
        "model": served.model,
        "input": QUESTION[0]["content"],
        "temperature": 0,
        "max_output_tokens": 60,
    }
    answered = client.responses.parse(**asked, text_format=Sum).output_parsed
    with client.responses.stream(**asked, text_format=Sum) as events:
        for _ in events:
            pass
        final = events.get_final_response().output_parsed
    assert isinstance(answered, Sum) and final == answered
    tool = openai.pydantic_function_tool(Sum, name="note")
    named = {"type": "function", "function": {"name": "note"}}
    called = client.chat.completions.parse(**body, tools=[tool], tool_choice=named).choices[0].message
    assert called.tool_calls and isinstance(called.tool_calls[0].function.parsed_arguments, Sum)


def test_a_stream_that_is_left_is_aborted(client: openai.OpenAI, served: Served, how: dict) -> None:
    stream = client.chat.completions.create(
        **{**how, "max_tokens": 1500}, stream=True, extra_body={"ignore_eos": True}
    )
    assert len(list(itertools.islice(stream, 3))) == 3
    stream.close()
    served.wait(lambda: 'num_requests_running{engine="0",model_name="coserve-demo"} 0.0' in metrics(served))


def metrics(served: Served) -> str:
    return served.http.get("/metrics").text


def test_the_asynchronous_client(served: Served, how: dict) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
            whole = client.chat.completions.create(**how)
            stream = await client.chat.completions.create(**how, stream=True)
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            return [(await whole).choices[0].message.content or "", text]

    whole, streamed = asyncio.run(ask())
    assert whole == streamed and "12" in whole


# ------------------------------------------------------------------ responses


def test_responses(client: openai.OpenAI, served: Served) -> None:
    first = client.responses.create(model=served.model, input="What is 7 + 5?", temperature=0)
    assert "12" in first.output_text and first.status == "completed"
    with client.responses.stream(model=served.model, input="What is 7 + 5?", temperature=0) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert text == first.output_text == stream.get_final_response().output_text
    second = client.responses.create(
        model=served.model, input="And 8 + 2?", previous_response_id=first.id, temperature=0
    )
    assert second.usage is not None and first.usage is not None
    assert second.usage.input_tokens > first.usage.input_tokens
    assert client.responses.retrieve(first.id) == first
    assert [item.type for item in client.responses.input_items.list(first.id)] == ["message"]
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    with pytest.raises(openai.BadRequestError, match="background"):
        client.responses.cancel(second.id)


def test_a_response_that_calls(client: openai.OpenAI, served: Served) -> None:
    tool = {"type": "function", "strict": False, **WEATHER}
    how = {"model": served.model, "temperature": 0, "tools": [tool]}
    first = client.responses.create(**how, input=str(ASKED[0]["content"]))
    (call,) = [item for item in first.output if item.type == "function_call"]
    assert json.loads(call.arguments) == {"city": "Paris"}
    output = {"type": "function_call_output", "call_id": call.call_id, "output": '{"sky": "sunny"}'}
    by_id = client.responses.create(**how, input=[output], previous_response_id=first.id)
    question = {"role": "user", "content": ASKED[0]["content"]}
    whole = client.responses.create(**how, input=[question, *first.output, output])
    assert by_id.output_text == whole.output_text != ""


# ------------------------------------------------------------------ errors and retries


def test_errors_have_their_classes(client: openai.OpenAI, how: dict) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(**{**how, "temperature": 5})
    assert (bad.value.param, bad.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.BadRequestError) as left_out:
        client.embeddings.create(model="x", input="y")
    assert left_out.value.code == "unsupported"
    with pytest.raises(openai.NotFoundError) as named:
        client.chat.completions.create(**{**how, "model": f"{how['model']}:pirate"})
    assert "named alone" in named.value.message and "'pirate'" in named.value.message
    with pytest.raises(openai.NotFoundError):
        client.get("/nowhere", cast_to=object)


def test_what_lasts_is_not_tried_again(served: Served) -> None:
    """The client repeats a 409 and a 5xx unless the answer says that it would be the same."""
    sent: list[str] = []
    transport = httpx.Client(event_hooks={"request": [lambda request: sent.append(str(request.url))]})
    client = openai.OpenAI(
        base_url=f"{served.url}/v1", api_key="none", max_retries=2, timeout=30, http_client=transport
    )
    made = client.uploads.create(bytes=3, filename="a.jsonl", mime_type="text/jsonl", purpose="fine-tune")
    client.uploads.cancel(made.id)
    sent.clear()
    with pytest.raises(openai.APIStatusError) as over:
        client.uploads.cancel(made.id)
    assert over.value.status_code in (400, 409) and len(sent) == 1


# ------------------------------------------------------------------ files


def test_files_and_uploads(client: openai.OpenAI) -> None:
    data = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    file = client.files.create(file=("a.jsonl", data), purpose="fine-tune")
    assert client.files.retrieve(file.id).bytes == len(data)
    assert client.files.content(file.id).read() == data
    assert file.id in [found.id for found in client.files.list(purpose="fine-tune", limit=2)]
    upload = client.uploads.create(
        bytes=2 * len(data), filename="b.jsonl", mime_type="text/jsonl", purpose="fine-tune"
    )
    parts = [client.uploads.parts.create(upload.id, data=data).id for _ in range(2)]
    done = client.uploads.complete(upload.id, part_ids=parts)
    assert done.status == "completed" and done.file is not None
    assert client.files.content(done.file.id).read() == data * 2
    for name in (file.id, done.file.id):
        assert client.files.delete(name).deleted
        with pytest.raises(openai.NotFoundError):
            client.files.retrieve(name)
