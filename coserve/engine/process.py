"""The engine process: `python -m coserve.engine.process ADDRESS`, configuration as JSON on standard input.

Start-up, serving and shutdown are the three functions below `main`.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import signal
import sys

import msgspec
import zmq

from coserve.config import EngineConfig
from coserve.engine import messages as m
from coserve.engine.engine import Engine
from coserve.errors import CoserveError
from coserve.kernels.dispatch import isa

logger = logging.getLogger(__name__)

IDLE_POLL_MS = 1000
LOADING_POLL_MS = 2  # somebody's first token waits for it
PR_SET_PDEATHSIG = 1
SWITCH_INTERVAL = 0.0005  # seconds: a step doesn't wait Python's 5 ms for a thread that reads an adapter


def main() -> int:
    """Run an engine until it is told to stop or its server is gone."""
    _die_with_parent()
    sys.setswitchinterval(SWITCH_INTERVAL)
    config = msgspec.json.decode(sys.stdin.buffer.read(), type=EngineConfig)
    _configure_log(config.log_file)
    context = zmq.Context()
    socket = context.socket(zmq.PAIR)
    socket.set_hwm(0)
    socket.connect(sys.argv[1])
    try:
        engine = start(config, socket)
        if engine is None:
            return 2
        serve(engine, socket)
        return 0
    finally:
        socket.close(linger=2000)
        context.term()


def start(config: EngineConfig, socket: zmq.Socket[bytes]) -> Engine | None:
    """Load the model and say so; a refused configuration is told to the server instead."""
    try:
        engine = Engine(
            config,
            send=lambda message: socket.send(m.encode(message)),
            arrivals=lambda: bool(socket.poll(0)),
        )
    except CoserveError as error:
        socket.send(m.encode(m.Reply(call_id=0, error=m.Fault.of(error))))
        return None
    ready = engine.describe()
    logger.info("%s on %s in %s; native kernels: %s", ready.model_name, ready.device, ready.dtype, isa())
    # What is there now stays: the collector need not look at it again, which takes a tenth of a second.
    gc.collect()
    gc.freeze()
    socket.send(m.encode(ready))
    return engine


def serve(engine: Engine, socket: zmq.Socket[bytes]) -> None:
    """Steps while there is work; otherwise wait for messages."""
    parent = os.getppid()
    while not engine.stopped:
        timeout = 0 if engine.has_work else (LOADING_POLL_MS if engine.is_loading else IDLE_POLL_MS)
        while socket.poll(timeout):
            engine.handle(m.decode_to_engine(socket.recv()))
            timeout = 0
        if engine.stopped:
            break
        engine.step()
        if os.getppid() != parent:
            logger.warning("the server is gone; stopping")
            engine.stop()


def _die_with_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the group; the server decides
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _configure_log(path: str) -> None:
    handler: logging.Handler = logging.FileHandler(path) if path else logging.StreamHandler()
    logging.basicConfig(
        handlers=[handler], level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )


if __name__ == "__main__":
    sys.exit(main())
