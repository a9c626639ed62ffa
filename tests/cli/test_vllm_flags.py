"""A `vllm serve` command line: taken over where it means something here, refused where it can't be had."""

from __future__ import annotations

from pathlib import Path

import pytest

from coserve.cli import main as command
from coserve.cli.vllm_flags import ours
from coserve.config import LoraModule, ServerConfig
from coserve.errors import ConfigError
from coserve.server import main as server_main


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[ServerConfig]:
    seen: list[ServerConfig] = []
    monkeypatch.setattr(server_main, "run_server", lambda config: seen.append(config) or 0)
    return seen


def test_a_whole_command_line(
    served: list[ServerConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = (
        "--served-model-name chat chat-latest --enable-lora --max_loras 4 --max-lora-rank 32 "
        f"--max-cpu-loras=8 --lora-modules sql={tmp_path} support={tmp_path} --max-model-len 2k "
        "--max-num-batched-tokens 1K --tensor-parallel-size 1 --dtype float --enable-chunked-prefill "
        "--disable-log-requests --trust-remote-code --scheduling-policy=priority --uvicorn-log-level warning "
        "--generation-config vllm --enable-force-include-usage --max-logprobs 5 --port 0 --seed 3 "
        "--enable-auto-tool-choice --tool-call-parser qwen3_xml --reasoning-parser qwen3 --response-role bot"
    )
    assert command.run(["serve", str(tmp_path), *flags.split()]) == 0
    (config,) = served
    engine = config.engine
    assert (engine.served_model_name, config.served_model_names) == ("chat", ("chat-latest",))
    assert (engine.max_loras, engine.max_lora_rank, engine.max_cpu_loras) == (4, 32, 8)
    assert (engine.max_model_len, engine.max_num_batched_tokens, engine.dtype) == (2000, 1024, "float32")
    assert config.lora_modules == tuple(LoraModule(name, str(tmp_path)) for name in ("sql", "support"))
    assert (config.log_level, config.generation_config) == ("warning", "vllm")
    assert config.force_include_usage and (engine.seed, config.max_logprobs) == (3, 5)
    assert config.enable_auto_tool_choice and config.response_role == "bot"
    assert (config.tool_call_parser, config.reasoning_parser) == ("qwen3_xml", "qwen3")
    said = capsys.readouterr().err.splitlines()
    left_out = [line.split()[1] for line in said]
    assert left_out == [
        "--enable-lora",
        "--tensor-parallel-size",
        "--enable-chunked-prefill",
        "--disable-log-requests",
        "--trust-remote-code",
        "--scheduling-policy",
    ]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--tensor-parallel-size 2", "--tensor-parallel-size 2: coserve serves from one device"),
        ("--quantization awq", "--quantization awq"),
        ("--tool-call-parser kimi_k2", "--tool-call-parser 'kimi_k2' is unknown; take one of auto, none"),
        ("--reasoning-parser kimi_k2", "--reasoning-parser 'kimi_k2' is unknown; take one of auto"),
        ("--kv-cache-dtype=fp8", "--kv-cache-dtype fp8"),
        ("--middleware my.module", "--middleware: coserve runs no code from outside"),
        ("--speculative-config {}", "no speculative decoding"),
        ("--uds /tmp/x", "--host and --port"),
        ("-tp", "-tp needs a value"),
        ("--no-such-flag", "--no-such-flag"),
        ("--generation-config /nowhere", "--generation-config /nowhere"),
        ("--uvicorn-log-level loud", "--uvicorn-log-level loud"),
        ("--revision main", "--revision main"),
        ("--max-model-len many", "--max-model-len"),
    ],
)
def test_what_cannot_be_had_is_named(line: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.run(["serve", *line.split()]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


def test_counts_as_vllm_writes_them() -> None:
    def number(text: str) -> str:
        return ours(["--max-model-len", text])[0][1]

    written = {"25.6k": "25600", "1K": "1024", "auto": "0", "-1": "0", "4096": "4096", "x": "x"}
    assert {text: number(text) for text in written} == written


def test_a_directory_is_the_model_not_a_name(tmp_path: Path) -> None:
    words = ["--served-model-name", "a", str(tmp_path)]
    assert ours(words)[0] == ["--served-model-name", "a", str(tmp_path)]
    with pytest.raises(ConfigError, match="needs a value"):
        ours(["--served-model-name"])
