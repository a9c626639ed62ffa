"""A request's outputs between the engine and a reader that may be slower, may leave, or never comes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from coserve.engine import output_stream
from coserve.engine.messages import Fault, RequestOutput, TokenLogprobs
from coserve.engine.output_stream import OutputStream
from coserve.errors import ReaderTooSlow, Unavailable


class Engine:
    """What a stream tells the engine."""

    def __init__(self, refusal: Exception | None = None) -> None:
        self.said: list[str] = []
        self.refusal = refusal

    def stream(self) -> OutputStream:
        return OutputStream(
            self._begin, lambda: self.said.append("abort"), lambda: self.said.append("forget")
        )

    async def _begin(self) -> None:
        self.said.append("begin")
        if self.refusal is not None:
            raise self.refusal


def output(token: int, reason: str | None = None, alternatives: int | None = None) -> RequestOutput:
    logprobs = []
    if alternatives is not None:
        logprobs = [TokenLogprobs(token, -1.0, 1, [(k, -1.0) for k in range(alternatives)])]
    return RequestOutput(request_id="r", token_ids=[token], logprobs=logprobs, finish_reason=reason)


def run(work: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(work(), 10))  # type: ignore[arg-type]


def test_outputs_come_in_order_and_end_with_the_last() -> None:
    async def work() -> None:
        engine = Engine()
        stream = engine.stream()
        reader = asyncio.create_task(collect(stream))
        await asyncio.sleep(0)
        for token in range(5):
            stream.put(output(token, "length" if token == 4 else None))
            if token % 2:
                await asyncio.sleep(0)
        assert await reader == [0, 1, 2, 3, 4]
        await stream.aclose()
        assert engine.said == ["begin", "forget"]

    run(work)


async def collect(stream: OutputStream) -> list[int]:
    return [token async for found in stream for token in found.token_ids]


def test_one_that_is_never_read_sends_nothing() -> None:
    async def work() -> None:
        engine = Engine()
        await engine.stream().aclose()
        assert engine.said == ["forget"]

    run(work)


def test_leaving_aborts_once() -> None:
    async def work() -> None:
        engine = Engine()
        stream = engine.stream()
        reader = asyncio.create_task(collect(stream))
        await asyncio.sleep(0)
        stream.put(output(1))
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        await stream.aclose()
        await stream.aclose()
        stream.put(output(2))
        assert engine.said == ["begin", "forget", "abort"]
        assert await collect(stream) == []

    run(work)


def test_the_engines_error_is_the_readers() -> None:
    async def work() -> None:
        stream = Engine().stream()
        reader = asyncio.create_task(collect(stream))
        await asyncio.sleep(0)
        fault = Fault.of(Unavailable("gone", retry_after=3.0))
        stream.put(RequestOutput(request_id="r", finish_reason="error", error=fault))
        with pytest.raises(Unavailable, match="gone"):
            await reader
        engine = Engine(Unavailable("not ready"))
        with pytest.raises(Unavailable, match="not ready"):
            await collect(engine.stream())

    run(work)


@pytest.mark.parametrize(("alternatives", "kept"), [(None, 40), (0, 40), (3, 10)])
def test_a_reader_far_behind_gets_what_was_kept_and_the_reason(
    monkeypatch: pytest.MonkeyPatch, alternatives: int | None, kept: int
) -> None:
    monkeypatch.setattr(output_stream, "MAX_BEHIND", 40)

    async def work() -> None:
        engine = Engine()
        stream = engine.stream()
        first = asyncio.create_task(anext(stream))
        await asyncio.sleep(0)
        stream.put(output(0, alternatives=alternatives))
        assert (await first).token_ids == [0]
        for token in range(1, 200):
            stream.put(output(token, alternatives=alternatives))
        assert engine.said == ["begin", "abort"]
        found = []
        with pytest.raises(ReaderTooSlow):
            async for one in stream:
                found += one.token_ids
        assert found[:3] == [1, 2, 3] and kept <= len(found) <= kept + 1
        assert engine.said == ["begin", "abort", "forget"]

    run(work)


def test_a_reader_that_keeps_up_late_is_not_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_stream, "MAX_BEHIND", 40)

    async def work() -> None:
        stream = Engine().stream()
        first = asyncio.create_task(anext(stream))
        await asyncio.sleep(0)
        for token in range(20):
            stream.put(output(token))
        assert (await first).token_ids == [0]
        for token in range(20, 300):  # always twenty behind
            stream.put(output(token, "length" if token == 299 else None))
            assert (await anext(stream)).token_ids == [token - 19]
        assert len(await collect(stream)) == 19

    run(work)
