"""Both servers as processes of their own: started alike, ready by the same test, measured the same way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import vllm_peer
from http_load import completion, free_port, request_body

ROOT = Path(__file__).resolve().parents[1]  # to run in: bench/ has a coserve.py that is not the package
MODEL = "bench"  # the base's name in requests
MAX_MODEL_LEN, MAX_NUM_SEQS, MAX_STEP_TOKENS, KV_GIB = 4096, 64, 2048, 1
READY_WITHIN = 600.0  # seconds
SHARED = (
    *("--served-model-name", MODEL, "--dtype", "bfloat16"),
    *("--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", str(MAX_NUM_SEQS)),
    *("--max-num-batched-tokens", str(MAX_STEP_TOKENS)),
    "--no-enable-prefix-caching",  # prompts repeat between rounds
)


def proportional_memory(processes: Iterable[int]) -> int:
    """Bytes (PSS) that these processes hold; those that have ended hold none."""
    total = 0
    for process in processes:
        try:
            text = Path(f"/proc/{process}/smaps_rollup").read_text()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        total += sum(int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith("Pss:"))
    return total


class Server:
    """A server's processes, from the start to the stop; `ready_seconds` and `ready_memory` are the time and
    the bytes (PSS) at its first answer."""

    def __init__(self, command: list[str], environment: dict[str, str], port: int) -> None:
        self.port = port
        descriptor, log = tempfile.mkstemp(suffix=".log")
        self._log = Path(log)
        began = time.perf_counter()
        self._process = subprocess.Popen(
            command, env=environment, stdout=descriptor, stderr=descriptor, start_new_session=True, cwd=ROOT
        )
        os.close(descriptor)
        try:
            self._wait(began + READY_WITHIN)
        except BaseException:
            self.stop()
            raise
        self.ready_seconds = time.perf_counter() - began
        self.first_ready_seconds = self.ready_seconds  # of the start before this one, where there was one
        self.ready_memory = self.memory()

    def _wait(self, deadline: float) -> None:
        while True:
            try:
                completion(self.port, request_body(MODEL, [400], 1)).close()
                return
            except OSError:  # not listening yet
                time.sleep(0.05)
            except RuntimeError as error:  # it listens but isn't ready
                if "HTTP 503" not in str(error):
                    raise
                time.sleep(0.05)
            if self._process.poll() is not None or time.perf_counter() > deadline:
                tail = self._log.read_text(errors="replace")[-3000:]
                raise RuntimeError(f"{self._process.args} is not ready:\n{tail}")

    def processes(self) -> list[int]:
        """The ids of its processes: those of its session."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    if os.getsid(int(entry.name)) == self._process.pid:
                        found.append(int(entry.name))
                except ProcessLookupError:
                    continue
        return found

    def memory(self) -> int:
        """Bytes of all its processes together, shared pages counted once (PSS)."""
        return proportional_memory(self.processes())

    def processor_seconds(self) -> float:
        """Processor time of all its processes so far."""
        ticks = 0
        for process in self.processes():
            try:
                fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        """End it politely, and what is left of its session after that."""
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(60)
        for process in self.processes():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self._process.wait()
        self._log.unlink()


def start_coserve(model: Path, state: Path, *flags: str) -> Server:
    """Ours, at its defaults but for what both share; `state` is an empty folder."""
    port = free_port()
    command = [sys.executable, "-m", "coserve.cli.main", "serve", str(model), *SHARED]
    command += ["--port", str(port), "--grpc-port", "0", "--kv-cache-memory-bytes", f"{KV_GIB}GiB"]
    dropped = ("GLIBC_TUNABLES", "OMP_NUM_THREADS")
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    return Server([*command, "--state-dir", str(state), *flags], environment, port)


def start_vllm(model: Path, *flags: str, setting: str = vllm_peer.BEST) -> Server:
    """The peer, at its defaults but for what both share and for `setting`."""
    port = free_port()
    command = vllm_peer.command("serve", str(model), *SHARED, "--port", str(port), *flags)
    return Server(command, vllm_peer.environment(setting, KV_GIB), port)


def warm_start(start: Callable[[], Server], *, once: bool) -> Server:
    """Start twice, unless `once`: the second finds the page cache and the peer's compiler's cache warm."""
    first = start()
    if once:
        return first
    first.stop()
    second = start()
    second.first_ready_seconds = first.ready_seconds
    return second


def idle_share(server: Server, seconds: float = 2.0) -> float:
    """Cores that a server without requests keeps busy."""
    before = server.processor_seconds()
    time.sleep(seconds)
    return (server.processor_seconds() - before) / seconds


def describe(server: Server, name: str, model: Path, *, kv_filled: bool) -> dict[str, object]:
    """What a server took to start and holds beyond the weights, as a row; to be called after the load.

    `kv_filled` says that it writes its whole KV pool at the start, as vLLM does; ours is touched as used.
    Either way `beyond_weights_and_kv_bytes` is what it held when ready, without weights and KV.
    """
    weights, pool = sum(file.stat().st_size for file in model.glob("*.safetensors")), KV_GIB << 30
    when_ready = server.ready_memory - weights
    return {
        "what": "the server itself",
        "server": name,
        "ready_seconds": server.ready_seconds,
        "first_ready_seconds": server.first_ready_seconds,
        "processes": len(server.processes()),
        "beyond_weights_and_kv_bytes": when_ready - (pool if kv_filled else 0),
        "beyond_weights_when_ready_bytes": when_ready,
        "beyond_weights_after_load_bytes": server.memory() - weights,
        "weights_bytes": weights,
        "kv_pool_bytes": pool,
        "idle_cores": idle_share(server),
    }
