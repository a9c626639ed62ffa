"""What a client is told about trying again, and that the official one listens."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import openai
import pytest

from coserve.errors import CoserveError, InternalError, QueueFull, RateLimited, Unavailable
from tests.server.running import BASE, ServerThread

HELLO = {"model": BASE, "messages": [{"role": "user", "content": "Hi"}]}


class _Broken(Exception):
    """Not of the error tree: a fault of ours."""


@pytest.fixture
def retrying(server: ServerThread) -> Iterator[tuple[openai.OpenAI, list[httpx.Request]]]:
    sent: list[httpx.Request] = []
    http = httpx.Client(event_hooks={"request": [sent.append]}, verify=False)
    with http:
        yield openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=2, http_client=http), sent
    server.engine.refusal = None


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "fault", [InternalError("The step failed."), _Broken("secret")], ids=["ours", "bug"]
)
def test_a_fault_that_would_come_again_is_not_tried_again(
    server: ServerThread, retrying: tuple[openai.OpenAI, list[httpx.Request]], fault: Exception, stream: bool
) -> None:
    client, sent = retrying
    server.engine.refusal = fault  # type: ignore[assignment]
    with pytest.raises(openai.InternalServerError) as raised:
        client.chat.completions.create(**HELLO, stream=stream)
    assert len(sent) == 1 and raised.value.response.headers["x-should-retry"] == "false"
    assert raised.value.request_id == raised.value.response.headers["x-request-id"]
    assert raised.value.type == "server_error" and "secret" not in raised.value.message


PASSING = [
    (RateLimited("Too many.", retry_after=0.2), 429, openai.RateLimitError),
    (Unavailable("Starting.", retry_after=0.2), 503, openai.InternalServerError),
    (QueueFull("Full.", retry_after=0.2), 503, openai.InternalServerError),
]


@pytest.mark.parametrize(("error", "status", "kind"), PASSING, ids=[type(row[0]).__name__ for row in PASSING])
def test_what_passes_says_when(
    http: httpx.Client, server: ServerThread, error: CoserveError, status: int, kind: type[Exception]
) -> None:
    server.engine.refusal = error
    try:
        for path, body in (
            ("/v1/chat/completions", HELLO),
            ("/v1/completions", {"prompt": "Hi"}),
            ("/v1/responses", {"input": "Hi"}),
        ):
            for stream in (False, True):
                answer = http.post(path, json={**body, "stream": stream})
                assert answer.status_code == status and int(answer.headers["retry-after"]) >= 1
                assert "x-should-retry" not in answer.headers
                assert answer.headers["content-type"] == "application/json", "before the first byte"
        with pytest.raises(kind):
            server.openai().chat.completions.create(**HELLO)
    finally:
        server.engine.refusal = None


def test_a_passing_refusal_is_tried_again(
    server: ServerThread, retrying: tuple[openai.OpenAI, list[httpx.Request]]
) -> None:
    client, sent = retrying
    server.engine.refusal = RateLimited("Too many.", retry_after=0.1)

    def relent(response: httpx.Response) -> None:
        server.engine.refusal = None

    client._client.event_hooks["response"] = [relent]
    assert client.chat.completions.create(**HELLO).choices[0].message.content
    assert [request.headers["x-stainless-retry-count"] for request in sent] == ["0", "1"]
