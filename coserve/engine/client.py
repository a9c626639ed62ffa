"""The server's end of the engine: spawns the engine process, talks to it, restarts it when it dies.

All methods run in the server's asyncio loop. Messages go over one ZeroMQ PAIR socket for each incarnation of
the engine, so nothing meant for a dead one can reach its successor.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Awaitable, Callable
from itertools import count

import msgspec
import zmq
import zmq.asyncio

from coserve import errors
from coserve.config import ALLOCATOR, EngineConfig
from coserve.engine import messages as m
from coserve.engine.output_stream import OutputStream
from coserve.engine.readiness import Readiness
from coserve.training.job import JobSpec
from coserve.training.model_calls import CallResult, ModelCall

logger = logging.getLogger(__name__)

Answer = m.Reply | m.EngineStats | m.ModelResult
JobEvent = m.JobProgress | m.JobCheckpoint | m.JobMessage | m.JobStatus
START_TIMEOUT = 600.0  # seconds a large model may take to load
MAX_RESTART_DELAY = 10.0
ENGINE_ENVIRONMENT = {
    "GLIBC_TUNABLES": ALLOCATOR,
    # Compute threads that wait give their core back soon: the server needs it.
    "GOMP_SPINCOUNT": "10000",
}


async def _ignore_event(event: JobEvent) -> None:
    logger.debug("job event before the server listens: %s", type(event).__name__)


async def _no_restart_hook() -> None:
    logger.debug("engine restarted before the server listens")


def _note_failure(sent: asyncio.Future[object]) -> None:
    """The engine is gone: whoever supervises it says so."""
    if not sent.cancelled() and sent.exception() is not None:
        logger.debug("a message did not reach the engine: %s", sent.exception())


class EngineClient(Readiness):
    """Owns the engine process."""

    program = ("-m", "coserve.engine.process")  # what Python is started with; the socket's address follows

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.info: m.EngineReady | None = None
        super().__init__()
        self.on_job_event: Callable[[JobEvent], Awaitable[None]] = _ignore_event
        self.on_stats: Callable[[m.EngineStats], None] = lambda stats: None
        self.on_lost: Callable[[], None] = lambda: None
        self.on_restart: Callable[[], Awaitable[None]] = _no_restart_hook
        self._context = zmq.asyncio.Context()
        self._socket: zmq.asyncio.Socket | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._streams: dict[str, OutputStream] = {}
        self._calls: dict[int, asyncio.Future[Answer]] = {}
        self._call_ids = count(1)
        self._job_events: asyncio.Queue[JobEvent] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False
        self._directory = tempfile.mkdtemp(prefix="coserve-")
        self._incarnation = 0

    # ------------------------------------------------------------------ life

    async def start(self) -> m.EngineReady:
        """Spawn the engine and wait until its model is loaded.

        Raises ConfigError when the engine refuses its configuration, InternalError when it dies otherwise.
        """
        reader = await self._spawn()
        self._tasks = [
            asyncio.create_task(self._supervise(reader)),
            asyncio.create_task(self._deliver_job_events()),
        ]
        assert self.info is not None
        return self.info

    async def shutdown(self, timeout: float) -> None:
        """Let jobs checkpoint and the engine exit; kill it after `timeout` seconds."""
        self._stopping = True
        process = self._process
        if process is not None and process.returncode is None:
            with contextlib.suppress(errors.CoserveError, asyncio.TimeoutError):
                await asyncio.wait_for(self._call(lambda i: m.Shutdown(call_id=i)), timeout)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(process.wait(), 5.0)
            if process.returncode is None:
                process.kill()
                await process.wait()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._job_events.join(), 5.0)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._fail_all("The server is shutting down.")
        if self._socket is not None:
            self._socket.close(linger=0)
        self._context.term()
        shutil.rmtree(self._directory, ignore_errors=True)

    async def _spawn(self) -> asyncio.Task[None]:
        """One incarnation: process, socket, reader task; returns when the model is loaded."""
        self._incarnation += 1
        address = f"ipc://{self._directory}/engine-{self._incarnation}"
        socket = self._context.socket(zmq.PAIR)
        socket.set_hwm(0)
        socket.bind(address)
        self._socket = socket
        config = msgspec.json.encode(self.config)
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            *self.program,
            address,
            stdin=asyncio.subprocess.PIPE,
            env={**ENGINE_ENVIRONMENT, **os.environ},
        )
        assert self._process.stdin is not None
        self._process.stdin.write(config)
        self._process.stdin.close()
        started: asyncio.Future[m.EngineReady] = asyncio.get_running_loop().create_future()
        reader = asyncio.create_task(self._read(socket, started))
        died = asyncio.create_task(self._process.wait())
        try:
            await asyncio.wait({started, died}, timeout=START_TIMEOUT, return_when=asyncio.FIRST_COMPLETED)
            if not started.done():
                raise errors.InternalError("The engine ended before its model was loaded; see its log.")
            self.info = started.result()
        except BaseException:
            reader.cancel()
            if self._process.returncode is None:
                self._process.kill()
            raise
        finally:
            died.cancel()
        self.ready = True
        return reader

    async def _supervise(self, reader: asyncio.Task[None]) -> None:
        """Restart the engine whenever it dies, with a growing pause while it keeps dying."""
        delay = 0.0
        loop = asyncio.get_running_loop()
        hook: asyncio.Task[None] | None = None
        while True:
            assert self._process is not None
            started_at = loop.time()
            code = await self._process.wait()
            self.ready = False
            reader.cancel()
            assert self._socket is not None
            self._socket.close(linger=0)
            self._fail_all("The engine stopped and is being restarted.")
            self.on_lost()
            if hook is not None:
                # Its calls to the engine that died have just failed, so it ends.
                await hook
            if self._stopping:
                return
            logger.error("engine process ended with status %s; restarting it", code)
            delay = 0.0 if loop.time() - started_at > 60.0 else min(MAX_RESTART_DELAY, 2 * delay + 0.25)
            while True:
                await asyncio.sleep(delay)
                try:
                    reader = await self._spawn()
                    break
                except errors.CoserveError as error:
                    delay = min(MAX_RESTART_DELAY, 2 * delay + 0.25)
                    logger.error("engine did not start: %s", error.message)
            hook = asyncio.create_task(self._run_restart_hook())

    async def _run_restart_hook(self) -> None:
        try:
            await self.on_restart()
        except errors.Unavailable:
            logger.warning("the engine died again while it was brought up to date")
        except Exception:
            logger.exception("the engine could not be brought up to date after its restart")

    # ------------------------------------------------------------------ requests

    def generate(self, add: m.AddRequest) -> OutputStream:
        """Outputs of a request, which is sent when the first is asked for, until its last. Leaving early
        aborts the request.

        Reading raises Unavailable when the engine is down or dies meanwhile, ReaderTooSlow to one that fell
        too far behind.
        """
        name = add.request_id

        async def begin() -> None:
            self._streams[name] = stream
            await self._send(add)

        stream = OutputStream(begin, lambda: self.abort(name), lambda: self._forget(name))
        return stream

    def _forget(self, request_id: str) -> None:
        self._streams.pop(request_id, None)

    def abort(self, request_id: str) -> None:
        """Stop a request whose iterator is still read; it ends with `finish_reason` "abort"."""
        self._post(m.AbortRequests(request_ids=[request_id]))

    # ------------------------------------------------------------------ calls

    async def load_adapter(self, ref: m.AdapterRef, pinned: bool = False, job_id: str = "") -> None:
        """Load an adapter's weights, or take over those that the job of this id has ended with; raises the
        error that refused them."""
        await self._call(lambda i: m.LoadAdapter(call_id=i, adapter=ref, pinned=pinned, job_id=job_id))

    async def unload_adapter(self, digest: str) -> None:
        """Free an adapter's weights once nobody uses them."""
        await self._call(lambda i: m.UnloadAdapter(call_id=i, digest=digest))

    async def submit_job(self, spec: JobSpec) -> None:
        """Start a job, or go on with it from its newest checkpoint."""
        await self._call(lambda i: m.SubmitJob(call_id=i, spec=spec))

    async def control_job(self, job_id: str, action: str) -> None:
        """`action`: "pause", "resume" or "cancel"."""
        await self._call(lambda i: m.ControlJob(call_id=i, job_id=job_id, action=action))

    async def open_model(self, spec: JobSpec) -> None:
        """A new model that is trained by calls, once there is a place for it."""
        await self._call(lambda i: m.OpenModel(call_id=i, spec=spec))

    async def call_model(self, model_id: str, call: ModelCall) -> CallResult:
        """Ask something of a model; calls are done in the order in which these coroutines begin. Raises what
        went wrong, Unavailable when the engine is down or dies meanwhile."""
        answer = await self._call(lambda i: m.CallModel(call_id=i, model_id=model_id, call=call))
        assert isinstance(answer, m.ModelResult)
        return answer.result

    async def close_model(self, model_id: str) -> None:
        """Forget a model."""
        await self._call(lambda i: m.CloseModel(call_id=i, model_id=model_id))

    async def stats(self) -> m.EngineStats:
        """A snapshot taken between two steps."""
        answer = await self._call(lambda i: m.GetStats(call_id=i))
        assert isinstance(answer, m.EngineStats)
        return answer

    async def _call(self, make: Callable[[int], m.Message]) -> Answer:
        call_id = next(self._call_ids)
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._calls[call_id] = future
        try:
            await self._send(make(call_id))
            answer = await future
        finally:
            self._calls.pop(call_id, None)
        if isinstance(answer, m.Reply) and answer.error is not None:
            raise answer.error.to_error()
        return answer

    # ------------------------------------------------------------------ wire

    async def _send(self, message: m.Message) -> None:
        if self._socket is None or not self.ready:
            raise errors.Unavailable("The engine is starting; try again in a moment.")
        await self._socket.send(m.encode(message))

    def _post(self, message: m.Message) -> None:
        """Send without waiting; for cleanup paths that must not be interrupted."""
        if self._socket is not None and self.ready:
            # It has left when this returns: the high-water mark is off. Sent past this socket, by another
            # handle of it, the reader would miss what came meanwhile, until somebody sends again.
            self._socket.send(m.encode(message)).add_done_callback(_note_failure)

    async def _read(self, socket: zmq.asyncio.Socket, started: asyncio.Future[m.EngineReady]) -> None:
        while True:
            message = m.decode_from_engine(await socket.recv())
            if isinstance(message, m.StepOutputs):
                for output in message.outputs:
                    stream = self._streams.get(output.request_id)
                    if stream is not None:
                        stream.put(output)
            elif isinstance(message, m.EngineReady):
                if not started.done():
                    started.set_result(message)
            elif isinstance(message, m.EngineStats) and message.call_id == 0:
                self.on_stats(message)
            elif isinstance(message, Answer):
                if isinstance(message, m.Reply) and message.error is not None and not started.done():
                    started.set_exception(message.error.to_error())
                future = self._calls.get(message.call_id)
                if future is not None and not future.done():
                    future.set_result(message)
            else:
                self._job_events.put_nowait(message)

    async def _deliver_job_events(self) -> None:
        while True:
            event = await self._job_events.get()
            try:
                await self.on_job_event(event)
            except Exception:
                logger.exception("job event was not taken")
            finally:
                self._job_events.task_done()

    def _fail_all(self, reason: str) -> None:
        fault = m.Fault.of(errors.Unavailable(reason))
        for request_id, stream in self._streams.items():
            stream.put(m.RequestOutput(request_id=request_id, finish_reason="error", error=fault))
        for future in self._calls.values():
            if not future.done():
                future.set_exception(errors.Unavailable(reason))
