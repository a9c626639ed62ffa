"""What the benches against other servers rest on, without those servers: prompts, adapters, clients."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import tokenizers

from coserve.lora.peft_files import read_adapter_info
from coserve.models.config import ModelConfig

BENCH = Path(__file__).parents[2] / "bench"
TOKENS = 5


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The programs' folder where they find each other."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(BENCH))
    yield
    for name in set(sys.modules) - before:
        if (BENCH / f"{name}.py").exists():
            del sys.modules[name]


class FakeServer(BaseHTTPRequestHandler):
    """Answers completions with as many tokens as asked for; the model "short" gives one less."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        status = 404 if body["model"] == "missing" else 200
        self.send_response(status)
        self.end_headers()
        if status == 404:
            self.wfile.write(b"no such model")
        elif body.get("stream"):
            for _ in range(body["max_tokens"]):
                self.wfile.write(b'data: {"choices": [{"text": "a"}]}\n\n')
            self.wfile.write(b'data: {"choices": [], "usage": {}}\n\ndata: [DONE]\n\n')
        else:
            count = body["max_tokens"] - (body["model"] == "short")
            self.wfile.write(json.dumps({"usage": {"completion_tokens": count}}).encode())

    def log_message(self, *words: Any) -> None:
        """Silence."""


@pytest.fixture
def port() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeServer)
    Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


@pytest.mark.usefixtures("bench")
def test_closed_loop_counts_what_was_generated(port: int) -> None:
    from http_load import Load, closed_loop

    load = Load(3, 7, 4, TOKENS)
    assert closed_loop(port, ["one", "two"], load, 1000) > 0
    with pytest.raises(RuntimeError, match="28 tokens came of 35"):
        closed_loop(port, ["short"], load, 1000)
    with pytest.raises(RuntimeError, match="HTTP 404: no such model"):
        closed_loop(port, ["missing"], load, 1000)


@pytest.mark.usefixtures("bench")
def test_decode_rate_reads_streams_that_run_together(port: int) -> None:
    from http_load import Load, decode_rate

    assert decode_rate(port, "one", Load(3, 3, 4, TOKENS), 1000) > 0


@pytest.mark.usefixtures("bench")
def test_prompts_are_the_same_for_a_seed() -> None:
    from http_load import Load

    load = Load(1, 4, 16, 1)
    prompts = load.prompts(1000, 3)
    assert prompts == load.prompts(1000, 3) != load.prompts(1000, 4)
    assert [len(prompt) for prompt in prompts] == [16] * 4
    assert all(300 <= token < 700 for prompt in prompts for token in prompt)


@pytest.mark.usefixtures("bench")
def test_made_tokenizer_fills_the_vocabulary_and_gives_ids_back(tmp_path: Path) -> None:
    import made_tokenizer

    made_tokenizer.write(tmp_path, 1000, {997: "<|begin|>", 998: "<|end|>"})
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 1000
    words = [*range(256, 997), 999]
    assert tokenizer.encode(tokenizer.decode(words)).ids == words
    text = "Any text, ä and 字 too."
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.usefixtures("bench")
def test_the_bench_writes_adapters_that_load(tmp_path: Path) -> None:
    import lora

    config = {"model_type": "qwen2", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config |= {"architectures": ["Qwen2ForCausalLM"], "max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").touch()
    lora.write_adapter(tmp_path / "adapter", tmp_path, 8, seed=1)
    info = read_adapter_info(tmp_path / "adapter", ModelConfig.from_dir(str(tmp_path)), 8)
    assert len(info.modules) == 2 * 7
    assert {module.rank for module in info.modules.values()} == {8}


def test_every_program_is_in_the_table() -> None:
    programs = {path.stem for path in BENCH.glob("*.py") if 'if __name__ == "__main__":' in path.read_text()}
    table = re.findall(r"^\| `(\w+)` \|", (BENCH / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(table) == sorted(programs)
    assert {"serve", "lora", "finetune", "kernels", "step"} <= programs
    asked = ["make", "-s", "--eval=names: ; @echo $(BENCH)", "names"]
    said = subprocess.run(asked, cwd=BENCH.parent, capture_output=True, text=True, check=True).stdout
    assert set(said.split()) == programs - {"tune"}  # which wants a GPU and changes a tracked file


@pytest.mark.long
def test_serve_measures_this_server_alone(tmp_path: Path) -> None:
    """The whole program with its small model; the peer is left out, so nothing is installed."""
    out = tmp_path / "serve.json"
    command = [sys.executable, str(BENCH / "serve.py"), "--quick", "--without-peer", "--out", str(out)]
    subprocess.run(command, env={**os.environ, "HOME": str(tmp_path)}, check=True, capture_output=True)
    result = json.loads(out.read_text())
    headline = result["headline"]
    assert headline["coserve"] > 0
    assert headline["peer"] is headline["ratio"] is headline["spread"] is None
    itself = result["rows"][-1]
    assert itself["server"] == "coserve"
    assert itself["beyond_weights_when_ready_bytes"] < itself["beyond_weights_after_load_bytes"]
