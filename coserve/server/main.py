"""The server process: start, serve, drain.

`run_server` is the whole life: parts are made in order of need, sockets are bound before the model loads (so
that a port in use is known at once), and SIGTERM or Ctrl-C drains.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import uvicorn
from starlette.types import ASGIApp

from coserve import log
from coserve.config import DEMO_MODEL_DIR, DEMO_MODEL_NAME, EngineConfig, ServerConfig
from coserve.core.slo import LatencyTargets
from coserve.engine.client import EngineClient
from coserve.engine.messages import EngineStats
from coserve.errors import ConfigError
from coserve.models.config import ModelConfig
from coserve.server.app import create_app
from coserve.server.auth import Authenticator
from coserve.server.context import Context
from coserve.server.database import Database
from coserve.server.grpc_server import GrpcServer
from coserve.server.health import metrics_app
from coserve.server.http_protocol import bounded
from coserve.server.keys_reload import KeysReload
from coserve.server.loop import Loop
from coserve.server.parts import make_parts
from coserve.server.service_tiers import ServiceTiers
from coserve.server.state_dir import StateDir
from coserve.server.tls import Tls
from coserve.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_ENGINE_SHUTDOWN = 20.0  # seconds for jobs to checkpoint
_GRPC_GRACE = 2.0
_OPEN_FILES = 65536
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_KEEP_ALIVE = 5.0  # seconds that a connection may rest between two requests
_SWITCH_INTERVAL = 0.0005  # seconds: streams don't wait Python's 5 ms for a thread that prepares a file
_COLLECT_AFTER = (10_000, 20, 20)  # objects, and collections of the younger ones: 400 requests make many
DEFAULT_STATE_DIR = "~/.local/state/coserve"
EngineFactory = Callable[[EngineConfig], EngineClient]


def run_server(config: ServerConfig) -> int:
    """Serve until SIGTERM (returns 0) or Ctrl-C (130). Raises ConfigError, InternalError before it serves."""
    log.configure(config.log_level)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one text at a time; the cores are the engine's
    sys.setswitchinterval(_SWITCH_INTERVAL)
    _allow_connections()
    with asyncio.Runner(loop_factory=Loop) as runner:
        return runner.run(_serve(config))


def _allow_connections() -> None:
    """As many open files as the system lets us have, up to what serves a crowd: the usual 1024 are taken by
    as many clients that do nothing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


async def _serve(config: ServerConfig) -> int:
    loop = asyncio.get_running_loop()
    received: asyncio.Future[None] = loop.create_future()
    task = asyncio.current_task()
    assert task is not None
    code = 0
    serving = False

    def stop(number: int) -> None:
        nonlocal code
        code = 130 if number == signal.SIGINT else 0
        if serving and not received.done():
            received.set_result(None)
        else:
            task.cancel()  # still starting, or told twice: don't wait

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    try:
        async with running_server(config) as server:
            serving = True
            _settle()
            if config.keys_file:
                loop.add_signal_handler(signal.SIGHUP, server.keys.reload)
            print(server.ready_line, flush=True)
            await received
            logger.info("draining")
    except asyncio.CancelledError:
        logger.info("stopped")
    return code


def _settle() -> None:
    """What is there at the start stays: the collector need not look at it again in every burst."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_COLLECT_AFTER)


@dataclass(frozen=True)
class RunningServer:
    """A server that takes requests: where it listens, and its parts."""

    context: Context
    http_url: str
    grpc_address: str
    keys: KeysReload
    metrics_port: int | None = None

    @property
    def ready_line(self) -> str:
        """The line printed once requests can come."""
        return f"coserve ready http={self.http_url} grpc={self.grpc_address} model={self.context.base.name}"


@contextlib.asynccontextmanager
async def running_server(
    config: ServerConfig, make_engine: EngineFactory = EngineClient
) -> AsyncIterator[RunningServer]:
    """A server for the time of the block; leaving it drains. `make_engine` lets tests bring their own."""
    default = LatencyTargets(ttft=config.engine.slo_ttft_ms / 1e3, tpot=config.engine.slo_tpot_ms / 1e3)
    keys = KeysReload(config, default)
    if keys.auth.is_open and config.host not in _LOOPBACK:
        logger.warning("without keys everybody who reaches %s may do everything", config.host)
    tiers = ServiceTiers(default, keys.file.classes)
    tls = Tls(config) if config.ssl_certfile else None
    state = StateDir(config.state_dir or DEFAULT_STATE_DIR)
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(state.close)
        http_socket = stack.enter_context(bind(config.host, config.port, "--port"))
        bind(config.host, config.grpc_port, "--grpc-port").close()  # grpc would log more
        metrics_socket = None
        if config.metrics_port is not None:
            metrics_socket = stack.enter_context(bind(config.host, config.metrics_port, "--metrics-port"))
        context = await _start_parts(config, keys.auth, tiers, state, make_engine, stack)
        if tls is not None and config.enable_ssl_refresh:
            await stack.enter_async_context(tls.watched())
        grpc_server = GrpcServer(context, tls)
        grpc_port = await grpc_server.start()
        stack.push_async_callback(grpc_server.stop, _GRPC_GRACE)
        seconds, refused = config.http_timeout, context.metrics.rejected
        app = create_app(context)
        await stack.enter_async_context(_http_server(app, http_socket, seconds, refused, tls))
        if metrics_socket is not None:
            app = metrics_app(context)
            await stack.enter_async_context(_http_server(app, metrics_socket, seconds, refused))
        await context.jobs.resume_all()
        if config.keys_file:
            stack.callback(asyncio.create_task(keys.watch()).cancel)
        stack.push_async_callback(_drain, context, grpc_server, config.shutdown_timeout)
        scheme = "https" if config.ssl_certfile else "http"
        host = f"[{config.host}]" if ":" in config.host else config.host
        yield RunningServer(
            context=context,
            http_url=f"{scheme}://{host}:{http_socket.getsockname()[1]}",
            grpc_address=f"{host}:{grpc_port}",
            metrics_port=metrics_socket.getsockname()[1] if metrics_socket is not None else None,
            keys=keys,
        )


async def _drain(context: Context, grpc_server: GrpcServer, timeout: float) -> None:
    """Nothing new; streams end; jobs checkpoint with the engine's end, which the caller's stack brings."""
    await grpc_server.set_not_serving()
    if not await context.lifecycle.drain(timeout):
        logger.warning(log.line("shutdown timeout", in_flight=context.lifecycle.in_flight))


async def _start_parts(
    config: ServerConfig,
    auth: Authenticator,
    tiers: ServiceTiers,
    state: StateDir,
    make_engine: EngineFactory,
    stack: contextlib.AsyncExitStack,
) -> Context:
    """Start the engine, and bring back what the state directory knows; the stack ends both."""
    engine_config = resolve_model(config.engine, state)
    model_config = ModelConfig.from_dir(engine_config.model)
    database = Database(state.database)
    stack.callback(database.close)
    engine = make_engine(engine_config)
    starting = asyncio.create_task(engine.start())
    try:  # the tokenizer is read while the engine loads the model
        chat_template = config.chat_template or None
        tokenizer = await asyncio.to_thread(
            Tokenizer.from_dir,
            engine_config.tokenizer or engine_config.model,
            chat_template,
            engine_config.model,
        )
        if tokenizer.id_limit > model_config.vocab_size and engine_config.tokenizer:
            raise ConfigError(
                f"--tokenizer: it has token ids up to {tokenizer.id_limit - 1}, the model "
                f"{model_config.vocab_size} tokens; give the one that the model was trained with.",
                param="tokenizer",
            )
    except BaseException:
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        raise
    await starting
    stack.push_async_callback(engine.shutdown, _ENGINE_SHUTDOWN)
    context = make_parts(config, auth, tiers, state, database, engine, model_config, tokenizer)
    await context.files.restore()
    await context.uploads.restore()
    await context.adapters.restore()
    await context.aliases.restore()
    await context.jobs.reports.restore()
    await context.tinker.start()
    stack.push_async_callback(context.tinker.close)
    _listen(context, state)
    engine.on_stats(await engine.stats())  # gauges are right before the first step
    stack.push_async_callback(context.jobs.close)
    await context.adapters.load_pinned()
    await context.adapters.load_at_start(config.lora_modules)
    return context


def _listen(context: Context, state: StateDir) -> None:
    """Hear the engine: its reports on jobs, its figures, and that it was started again."""
    engine, jobs, adapters, metrics = context.engine, context.jobs, context.adapters, context.metrics

    is_reported = False

    def on_stats(stats: EngineStats) -> None:
        nonlocal is_reported
        if stats.least_targets is not None and not is_reported:
            is_reported = True
            for sentence in context.tiers.out_of_reach(stats.least_targets):
                logger.warning(sentence)
        metrics.engine_stats(stats)
        if stats.adapter_tiers is not None:
            adapters.take_tiers(stats.adapter_tiers)
        if stats.latency_model:
            state.save_latency_model(stats.latency_model)

    def on_lost() -> None:
        metrics.engine_lost()
        adapters.take_tiers({})

    async def on_restart() -> None:
        assert engine.info is not None
        metrics.engine_started(engine.info, restarted=True)
        await jobs.engine_died()
        await adapters.load_pinned()
        await jobs.resume_all()

    engine.on_job_event = jobs.reports.take
    engine.on_stats = on_stats
    engine.on_lost = on_lost
    engine.on_restart = on_restart


def resolve_model(config: EngineConfig, state: StateDir) -> EngineConfig:
    """The engine's settings with the demo model, its public name and its files filled in.

    Raises ConfigError when `--model` is no directory.
    """
    model, name = config.model, config.served_model_name
    if model in ("", DEMO_MODEL_NAME):
        model, name = str(DEMO_MODEL_DIR), name or DEMO_MODEL_NAME
    path = Path(model).expanduser()
    if not path.is_dir():
        raise ConfigError(
            f"--model {model}: no such directory; give the path of a model directory.", param="model"
        )
    return msgspec.structs.replace(
        config,
        model=str(path.absolute()),
        served_model_name=name or path.absolute().name,
        log_file=config.log_file or str(state.engine_log),
        latency_file=config.latency_file or str(state.latency_model),
    )


def bind(host: str, port: int, flag: str) -> socket.socket:
    """A listening socket; ConfigError in one line when the address can't be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named since asyncio switches Nagle's delay off only for sockets that say theirs.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(1024)
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"{flag} {port}: can't listen on {host}:{port} ({reason}).", param=flag[2:]
        ) from None
    return listener


class _Uvicorn(uvicorn.Server):
    """uvicorn without its signal handlers: draining is ours."""

    @contextlib.contextmanager
    def capture_signals(self):  # type: ignore[no-untyped-def]
        yield


@contextlib.asynccontextmanager
async def _http_server(
    app: ASGIApp,
    listener: socket.socket,
    timeout: float,
    refused: Callable[[str], None],
    tls: Tls | None = None,
) -> AsyncIterator[None]:
    server = _Uvicorn(
        uvicorn.Config(
            app,
            http=bounded(timeout, refused),
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            timeout_graceful_shutdown=2,
            timeout_keep_alive=min(timeout or _KEEP_ALIVE, _KEEP_ALIVE),  # type: ignore[arg-type]
            ssl_context_factory=(lambda config, make: tls.http_context) if tls is not None else None,
        )
    )
    task = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started and not task.done():
        await asyncio.sleep(0.005)
    if task.done():
        task.result()
        raise ConfigError("The HTTP server could not start; see the log.")
    try:
        yield
    finally:
        server.should_exit = True
        await task
