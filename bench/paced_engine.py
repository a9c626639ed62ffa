"""An engine without a model for bench/surface.py: every request gets one token a step, steps keep a pace.

`SERVE` runs `coserve serve` over it, with the flags that follow; its child, the engine's process, speaks the
real one's messages over the real socket.
"""

from __future__ import annotations

import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec
import zmq

from coserve.config import DEMO_MODEL_DIR, EngineConfig
from coserve.engine import messages as m
from coserve.models.config import ModelConfig
from coserve.tokenizer import Tokenizer

# Last on the path: the folder's coserve.py is not the package.
_RUN = f"import sys; sys.path.append({str(Path(__file__).resolve().parent)!r}); import paced_engine; "
SERVE = _RUN + "sys.exit(paced_engine.serve(sys.argv[1:]))"
_ENGINE = _RUN + "paced_engine.engine(sys.argv[1])"

TEXT = "The quick brown fox jumps over the lazy dog, and then it rests for a while in the shade. "
DEFAULT_PACE = 0.05  # seconds a step; COSERVE_BENCH_PACE sets another


@dataclass
class _Row:
    add: m.AddRequest
    made: int = 0


class PacedEngine:
    """Requests in, one token for each of them a step."""

    def __init__(self, config: EngineConfig, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket
        self._tokens = Tokenizer.from_dir(DEMO_MODEL_DIR).encode(TEXT, add_special_tokens=False)
        self._rows: dict[str, _Row] = {}
        self._stopped = False
        model = ModelConfig.from_dir(DEMO_MODEL_DIR)
        self._send(
            m.EngineReady(
                pid=os.getpid(),
                model_name=config.served_model_name,
                max_model_len=100_000,
                vocab_size=model.vocab_size,
                num_blocks=1,
                block_size=16,
                device="cpu",
                dtype="float32",
            )
        )

    def run(self, pace: float) -> None:
        """Steps until told to shut down."""
        due = 0.0
        while not self._stopped:
            now = time.monotonic()
            due = due if self._rows else now + pace
            wait = max(0.0, due - now) if self._rows else 1.0
            if self._socket.poll(math.ceil(wait * 1e3)):
                self._take(m.decode_to_engine(self._socket.recv()))
            elif self._rows:
                self._step()
                due = max(due + pace, time.monotonic())

    def _step(self) -> None:
        outputs = []
        for request_id, row in list(self._rows.items()):
            token = self._tokens[row.made % len(self._tokens)]
            row.made += 1
            last = row.made >= row.add.sampling.max_tokens
            first = time.time() if row.made == 1 else None
            outputs.append(
                m.RequestOutput(
                    request_id=request_id,
                    token_ids=[token],
                    finish_reason="length" if last else None,
                    scheduled_at=first,
                )
            )
            if last:
                del self._rows[request_id]
        self._send(m.StepOutputs(outputs=outputs))

    def _take(self, message: object) -> None:
        if isinstance(message, m.AddRequest):
            self._rows[message.request_id] = _Row(message)
        elif isinstance(message, m.AbortRequests):
            for request_id in message.request_ids:
                self._rows.pop(request_id, None)
        elif isinstance(message, m.GetStats):
            self._send(m.EngineStats(call_id=message.call_id, running=len(self._rows)))
        else:
            self._stopped = isinstance(message, m.Shutdown)
            self._send(m.Reply(call_id=message.call_id))  # type: ignore[attr-defined]

    def _send(self, message: m.Message) -> None:
        self._socket.send(m.encode(message))


def engine(address: str) -> None:
    """The engine's process."""
    config = msgspec.json.decode(sys.stdin.buffer.read(), type=EngineConfig)
    socket = zmq.Context.instance().socket(zmq.PAIR)
    socket.set_hwm(0)
    socket.connect(address)
    PacedEngine(config, socket).run(float(os.environ.get("COSERVE_BENCH_PACE", DEFAULT_PACE)))
    socket.close(linger=1000)


def serve(arguments: list[str]) -> int:
    """A `coserve` command line (serve and its flags) whose engine is the one above."""
    from coserve.cli import main as command
    from coserve.engine.client import EngineClient

    EngineClient.program = ("-c", _ENGINE)
    return command.run(arguments)
