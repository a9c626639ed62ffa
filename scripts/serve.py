"""Run `coserve serve` with the given flags in the foreground; once it is ready, say what to try next."""

from __future__ import annotations

import re
import signal
import subprocess
import sys

HINTS = """
  talk to it:      coserve chat --url {http}
  fine-tune it:    coserve finetune DATA.jsonl --adapter NAME --grpc {grpc}
  by curl:         curl {http}/v1/chat/completions -H 'Content-Type: application/json' \\
                     -d '{{"model": "{model}", "messages": [{{"role": "user", "content": "Who are you?"}}]}}'
  by openai:       OpenAI(base_url="{http}/v1", api_key="none")
  by grpcurl:      grpcurl -plaintext {grpc} list
  what it does:    curl {http}/metrics
  (coserve is .venv/bin/coserve; Ctrl-C ends the server)
"""
READY = re.compile(r"coserve ready http=(?P<http>\S+) grpc=(?P<grpc>\S+) model=(?P<model>\S+)")


def main() -> int:
    """The server's exit code; signals go on to it."""
    command = [sys.executable, "-m", "coserve.cli.main", "serve", *sys.argv[1:]]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to the server as well
    signal.signal(signal.SIGTERM, lambda *_: server.terminate())
    assert server.stdout is not None
    for line in server.stdout:
        print(line, end="", flush=True)
        ready = READY.match(line)
        if ready:
            print(HINTS.format(**ready.groupdict()), flush=True)
    return server.wait()


if __name__ == "__main__":
    sys.exit(main())
