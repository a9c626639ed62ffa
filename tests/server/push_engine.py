"""A FakeEngine that makes tokens whether anybody reads them or not, as a real engine does."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from coserve.engine import messages as m
from coserve.engine.output_stream import OutputStream
from tests.server.fake_engine import FakeEngine

TOGETHER = 50  # outputs of a request before others have their turn


class PushEngine(FakeEngine):
    """Outputs go into each request's stream; contexts are long."""

    async def start(self) -> m.EngineReady:
        await super().start()
        assert self.info is not None
        self.info = m.EngineReady(
            **{
                **{name: getattr(self.info, name) for name in self.info.__struct_fields__},
                "max_model_len": 10**6,
            }
        )
        return self.info

    def generate(self, add: m.AddRequest) -> OutputStream:  # type: ignore[override]
        task: asyncio.Task[None] | None = None

        async def begin() -> None:
            nonlocal task
            self.requests.append(add)
            task = asyncio.create_task(self._make(add, stream))

        def abort() -> None:
            self.aborted.append(add.request_id)
            if task is not None:
                task.cancel()

        stream = OutputStream(begin, abort, lambda: None)
        return stream

    async def _make(self, add: m.AddRequest, stream: OutputStream) -> None:
        with suppress(asyncio.CancelledError):
            for place, output in enumerate(self._outputs(add)):
                stream.put(output)
                if place % TOGETHER == TOGETHER - 1:
                    await asyncio.sleep(0)
