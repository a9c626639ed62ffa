"""LangChain against a live server. Prints one JSON object: a check's name to its error, or null."""

import asyncio
import json
import os
import traceback

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel

URL, MODEL = os.environ["COSERVE_URL"] + "/v1", os.environ["COSERVE_MODEL"]
HOW = {
    "base_url": URL,
    "api_key": "none",
    "model": MODEL,
    "temperature": 0,
    "max_tokens": 60,
    "max_retries": 0,
}
QUESTION = "What is 7 + 5?"


@tool
def get_weather(city: str) -> str:
    """Current weather of a city."""
    return json.dumps({"sky": "sunny"})


class Sum(BaseModel):
    """A sum."""

    sum: int


def invoke():
    answer = ChatOpenAI(**HOW).invoke(QUESTION)
    assert "12" in answer.content
    assert answer.usage_metadata["total_tokens"] == answer.response_metadata["token_usage"]["total_tokens"]
    assert answer.response_metadata["finish_reason"] == "stop"


def stream():
    chat = ChatOpenAI(**HOW, stream_usage=True)
    chunks = list(chat.stream(QUESTION))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert whole.content == chat.invoke(QUESTION).content and len(chunks) > 2
    assert whole.usage_metadata["output_tokens"] > 0


def batches():
    answers = ChatOpenAI(**HOW).batch(["What is 2 + 2?", "What is 3 + 3?"])
    assert ["4" in answers[0].content, "6" in answers[1].content] == [True, True]
    assert "12" in asyncio.run(ChatOpenAI(**HOW).ainvoke(QUESTION)).content


def tools():
    chat = ChatOpenAI(**HOW).bind_tools([get_weather])
    asked = HumanMessage("What is the weather in Paris?")
    called = chat.invoke([asked])
    (call,) = called.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Paris"})
    output = get_weather.invoke(call)
    assert isinstance(output, ToolMessage) and chat.invoke([asked, called, output]).content
    whole = None
    for chunk in chat.stream([asked]):
        whole = chunk if whole is None else whole + chunk
    assert whole.tool_calls[0]["args"] == {"city": "Paris"}


def structured_output():
    for method in ("json_schema", "function_calling"):
        chat = ChatOpenAI(**HOW).with_structured_output(Sum, method=method)
        assert isinstance(chat.invoke(QUESTION), Sum)


def responses():
    answer = ChatOpenAI(**HOW, use_responses_api=True).invoke(QUESTION)
    assert "12" in answer.text
    text = "".join(chunk.text for chunk in ChatOpenAI(**HOW, use_responses_api=True).stream(QUESTION))
    assert text == answer.text


def completions():
    assert OpenAI(**HOW).invoke("Once upon")
    assert "".join(OpenAI(**HOW).stream("Once upon"))


CHECKS = (invoke, stream, batches, tools, structured_output, responses, completions)


def outcome(check):
    """Its error, or None."""
    try:
        check()
    except Exception:
        return traceback.format_exc()


if __name__ == "__main__":
    print(json.dumps({check.__name__: outcome(check) for check in CHECKS}))
