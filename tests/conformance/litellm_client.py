"""LiteLLM against a live server. Prints one JSON object: a check's name to its error, or null."""

import asyncio
import json
import os
import traceback

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it would fetch a list of prices

import litellm

litellm.telemetry = False
HOW = {
    "model": "openai/" + os.environ["COSERVE_MODEL"],
    "api_base": os.environ["COSERVE_URL"] + "/v1",
    "api_key": "none",
    "temperature": 0,
    "num_retries": 0,
}
QUESTION = [{"role": "user", "content": "What is 7 + 5?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Current weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def completion():
    answer = litellm.completion(messages=QUESTION, max_tokens=20, **HOW)
    assert "12" in answer.choices[0].message.content and answer.usage.total_tokens > 0


def stream():
    chunks = list(
        litellm.completion(messages=QUESTION, stream=True, stream_options={"include_usage": True}, **HOW)
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert "12" in text and litellm.stream_chunk_builder(chunks).choices[0].message.content == text


def hosted_vllm():
    how = {**HOW, "model": HOW["model"].replace("openai/", "hosted_vllm/")}
    answer = litellm.completion(messages=QUESTION, top_k=1, **how)
    assert "12" in answer.choices[0].message.content


def asynchronous():
    answer = asyncio.run(litellm.acompletion(messages=QUESTION, **HOW))
    assert "12" in answer.choices[0].message.content


def tools():
    asked = [{"role": "user", "content": "What is the weather in Paris?"}]
    message = litellm.completion(messages=asked, tools=[WEATHER], **HOW).choices[0].message
    assert json.loads(message.tool_calls[0].function.arguments) == {"city": "Paris"}


def responses():
    answer = litellm.responses(input="What is 7 + 5?", **{k: v for k, v in HOW.items() if k != "num_retries"})
    assert "12" in answer.output[0].content[0].text


def text_completion():
    how = {**HOW, "model": HOW["model"].replace("openai/", "text-completion-openai/")}
    assert litellm.text_completion(prompt="Once upon", max_tokens=8, **how).choices[0].text


def errors():
    try:
        litellm.completion(messages=QUESTION, **{**HOW, "model": "openai/nobody"})
    except litellm.NotFoundError as error:
        assert error.status_code == 404
    else:
        raise AssertionError("nobody answered")


CHECKS = (completion, stream, hosted_vllm, asynchronous, tools, responses, text_completion, errors)


def outcome(check):
    """Its error, or None."""
    try:
        check()
    except Exception:
        return traceback.format_exc()


if __name__ == "__main__":
    print(json.dumps({check.__name__: outcome(check) for check in CHECKS}))
