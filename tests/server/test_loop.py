"""gRPC's completions reach the server's loop without its socket; other sockets are watched as ever."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import asyncio, socket
import grpc.aio
from coserve.server.loop import Loop

async def main():
    handler = grpc.unary_unary_rpc_method_handler(answer)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("a.B", {"C": handler})])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary("/a.B/C")
        print(await asyncio.gather(*[call(b"hello") for _ in range(20)]) == [b"hello"] * 20)
    await server.stop(None)
    ours, theirs = socket.socketpair()
    seen = asyncio.Event()
    asyncio.get_running_loop().add_reader(ours, seen.set)
    theirs.send(b"x")
    await seen.wait()
    asyncio.get_running_loop().remove_reader(ours)
    print("watched")

async def answer(request, context):
    return request

refused = []

class Counting(Loop):
    def add_reader(self, fd, callback, *args):
        try:
            super().add_reader(fd, callback, *args)
        except Exception:
            refused.append(fd)
            raise

with asyncio.Runner(loop_factory=Counting) as runner:
    runner.run(main())
print(len(refused))
"""


def test_grpc_hands_its_completions_over_by_calls() -> None:
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60)
    assert (run.stdout.split(), run.stderr) == (["True", "watched", "1"], "")
