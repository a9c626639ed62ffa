"""A whole server on free ports, in a thread with a loop of its own, over a FakeEngine."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import grpc
import httpx
import msgspec
import openai

from coserve.config import EngineConfig, ServerConfig
from coserve.server.main import RunningServer, running_server
from tests.server.fake_engine import FakeEngine

_T = TypeVar("_T")
BASE = "coserve-demo"


class ServerThread:
    """Starts at once; `stop` drains. `call` runs a coroutine in the server's loop. Jobs train by themselves
    with `auto_train`."""

    def __init__(
        self,
        state_dir: Path,
        *,
        auto_train: bool = True,
        engine_class: type[FakeEngine] = FakeEngine,
        **settings: Any,
    ) -> None:
        self._auto_train = auto_train
        self._engine_class = engine_class
        self.config = ServerConfig(
            engine=EngineConfig(model=""), port=0, grpc_port=0, state_dir=str(state_dir), shutdown_timeout=5.0
        )
        self.config = msgspec.structs.replace(self.config, **settings)
        self.engine: FakeEngine
        self.server: RunningServer
        self.error: BaseException | None = None
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._ready.wait(30)
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        except BaseException as error:
            self.error = error
        finally:
            self._ready.set()

    async def _serve(self) -> None:
        def make(config: EngineConfig) -> FakeEngine:
            self.engine = self._engine_class(config)
            self.engine.auto_train = self._auto_train
            return self.engine

        async with running_server(self.config, make) as server:  # type: ignore[arg-type]
            self.server = server
            self._ready.set()
            await self._stop.wait()

    def call(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(20)

    def begin_stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)

    def stop(self) -> None:
        if self._thread.is_alive():
            self.begin_stop()
        self._thread.join(30)
        assert not self._thread.is_alive()
        if self.error is not None:
            raise self.error

    @property
    def url(self) -> str:
        return self.server.http_url

    # The clients skip loading certificates, which takes longer than most tests.

    def http(self, key: str | None = None) -> httpx.Client:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=20, verify=False)

    def openai(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, http_client=self.http())

    @contextlib.contextmanager
    def channel(self) -> Iterator[grpc.Channel]:
        with grpc.insecure_channel(self.server.grpc_address) as channel:
            yield channel


def wait_for(condition: Callable[[], _T], seconds: float = 10.0) -> _T:
    """The first truthy value of `condition`; AssertionError when it doesn't come."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, "condition not met in time"
        time.sleep(0.01)
