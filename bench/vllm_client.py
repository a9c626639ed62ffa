"""vLLM's own client, `vllm bench serve`, for any server of OpenAI's API: an open loop of Poisson arrivals."""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import vllm_peer

FIELDS = ("ttft", "tpot", "itl")


def open_loop(
    port: int, model: str, tokenizer: Path, rate: float, requests: int, lengths: tuple[int, int], seed: int
) -> dict[str, Any]:
    """Milliseconds to the first token, for each one after it, and between two (p50, p99); tokens/s.

    `rate` is requests/s, `lengths` prompt and output tokens. Raises RuntimeError when a request failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "backend": "openai",
            "base-url": f"http://127.0.0.1:{port}",
            "endpoint": "/v1/completions",
            "model": model,
            "tokenizer": str(tokenizer),
            "dataset-name": "random",
            "random-input-len": str(lengths[0]),
            "random-output-len": str(lengths[1]),
            "num-prompts": str(requests),
            "request-rate": str(rate),
            "seed": str(seed),
            "temperature": "0",
            "percentile-metrics": ",".join(FIELDS),
            "metric-percentiles": "50,99",
            "result-dir": folder,
            "result-filename": "result.json",
        }
        words = [f"--{name}={value}" for name, value in options.items()]
        plain = ("--ignore-eos", "--save-result", "--disable-tqdm")
        command = vllm_peer.command("bench", "serve", *plain, *words)
        environment = vllm_peer.environment("as it comes")
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"vllm bench serve: {run.stderr[-2000:]}")
        result = json.loads((Path(folder) / "result.json").read_text())
    if result["completed"] != requests:
        raise RuntimeError(f"{result['completed']} of {requests} requests were answered")
    figures = {f"{f}_p{p}_ms": result[f"p{p}_{f}_ms"] for f in FIELDS for p in (50, 99)}
    return {**figures, "tokens_per_second": result["output_throughput"], "seconds": result["duration"]}
