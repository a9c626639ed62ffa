"""The server's end of the wire, with a bare socket in the engine's place."""

from __future__ import annotations

import asyncio
import select
from pathlib import Path

import zmq

from coserve.config import EngineConfig
from coserve.engine import messages as m
from coserve.engine.client import EngineClient


def test_an_abort_does_not_keep_the_reader_from_what_has_come(tmp_path: Path) -> None:
    """A ZeroMQ socket says once that something came, to whoever touches it next: an abort that was sent past
    asyncio's handle of it left streams and gauges as they were until the next request."""

    async def talk() -> None:
        client = EngineClient(EngineConfig(model=""))
        heard = asyncio.Event()
        client.on_stats = lambda stats: heard.set()
        mine = client._context.socket(zmq.PAIR)
        mine.bind(f"ipc://{tmp_path}/engine")
        client._socket, client.ready = mine, True
        reader = asyncio.create_task(client._read(mine, asyncio.get_running_loop().create_future()))
        with zmq.Context() as context, context.socket(zmq.PAIR) as engine:
            engine.connect(f"ipc://{tmp_path}/engine")
            for _ in range(3):
                engine.send(m.encode(m.EngineStats()))
                await asyncio.wait_for(heard.wait(), 10)
                heard.clear()
            engine.send(m.encode(m.EngineStats()))
            arrived, _, _ = select.select([mine.getsockopt(zmq.FD)], [], [], 10)  # the loop stands still
            assert arrived
            client._post(m.AbortRequests(request_ids=["a"]))
            await asyncio.wait_for(heard.wait(), 10)
            assert isinstance(m.decode_to_engine(engine.recv()), m.AbortRequests)
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        mine.close(linger=0)
        client._context.term()

    asyncio.run(talk())
