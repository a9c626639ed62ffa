"""Large requests are prepared beside the event loop, small ones in it; both are answered alike."""

from __future__ import annotations

import asyncio
import threading

import httpx
import pytest

from coserve.errors import InvalidRequest
from coserve.server.preparing import LARGE, prepared
from tests.server.fake_engine import TOKENIZER
from tests.server.running import BASE, ServerThread


def test_the_loop_goes_on_while_a_large_request_is_prepared() -> None:
    async def run() -> tuple[bool, int]:
        seen = threading.Event()
        asyncio.get_running_loop().call_soon(seen.set)
        return await prepared(lambda: seen.wait(5), LARGE), await prepared(threading.get_ident, LARGE - 1)

    went_on, thread = asyncio.run(run())
    assert went_on and thread == threading.get_ident()


@pytest.mark.parametrize("size", [1, LARGE])
def test_a_refusal_comes_out_as_it_is(size: int) -> None:
    def refuse() -> None:
        raise InvalidRequest("No.", param="prompt")

    with pytest.raises(InvalidRequest, match="No"):
        asyncio.run(prepared(refuse, size))


def test_long_prompts_are_read_as_short_ones_are(server: ServerThread) -> None:
    text = "hello world, " * 2000
    assert len(text) > LARGE
    with server.http() as http:
        ids = http.post("/tokenize", json={"model": BASE, "prompt": text}).json()["tokens"]
        assert ids == TOKENIZER.encode(text) and len(ids) > 1000
        long: list[httpx.Response] = [
            http.post("/v1/completions", json={"model": BASE, "prompt": text, "max_tokens": 1}),
            http.post(
                "/v1/chat/completions",
                json={"model": BASE, "messages": [{"role": "user", "content": text}], "stream": True},
            ),
        ]
    for answer in long:
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "context_length_exceeded"
