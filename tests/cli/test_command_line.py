"""The command line without a server: how values are read, what is refused, and with which exit code."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from coserve.cli import finetune_flags as flags
from coserve.cli import main as command
from coserve.cli import serve
from coserve.cli.finetune import settings
from coserve.cli.progress import JobView, duration
from coserve.cli.values import lora_modules, pairs, size_in_bytes
from coserve.config import DEMO_MODEL_DIR, DEMO_MODEL_NAME, LoraModule, ServerConfig
from coserve.errors import ConfigError

NOWHERE = "127.0.0.1:9"  # the discard port: nothing answers there
SECURE = f"serve --ssl-keyfile {__file__} --ssl-certfile {__file__}"


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[ServerConfig]:
    """Configurations that `coserve serve` would run; nothing is started."""
    module = type(sys)("coserve.server.main")
    seen: list[ServerConfig] = []
    module.run_server = lambda config: seen.append(config)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "coserve.server.main", module)
    return seen


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1073741824", 2**30),
        ("512MiB", 2**29),
        ("2GB", 2 * 10**9),
        ("1.5Gi", 3 * 2**29),
        ("4k", 4000),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert size_in_bytes(text, "--kv-cache-memory-bytes") == size


@pytest.mark.parametrize("text", ["", "many", "-1", "5 apples", "1e9", "MiB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="--kv-cache-memory-bytes"):
        size_in_bytes(text, "--kv-cache-memory-bytes")


def test_pairs() -> None:
    assert pairs(["a=/x", "b=/y=z"], "--lora-modules") == (("a", "/x"), ("b", "/y=z"))


@pytest.mark.parametrize("values", [["a"], ["=x"], ["a="], ["a=1", "a=2"]])
def test_pairs_that_are_none(values: list[str]) -> None:
    with pytest.raises(ConfigError, match="--lora-modules"):
        pairs(values, "--lora-modules")


def test_lora_modules_as_pairs_and_as_vllm_s_and_sglang_s_json() -> None:
    values = ["a=/x", '{"name": "b", "path": "/y", "base_model_name": "base"}']
    values.append('{"lora_name": "c", "lora_path": "/z", "pinned": true}')
    assert lora_modules(values) == (LoraModule("a", "/x"), LoraModule("b", "/y"), LoraModule("c", "/z", True))


@pytest.mark.parametrize(
    "values",
    [
        ["{"],
        ['{"name": "a"}'],
        ['{"name": "a", "path": ""}'],
        ['{"name": 1, "path": "/x"}'],
        ['{"name": "a", "path": "/x", "pinned": "yes"}'],
        ['{"name": "a", "path": "/x", "rank": 4}'],
        ["a=/x", '{"name": "a", "path": "/y"}'],
    ],
)
def test_lora_modules_that_are_none(values: list[str]) -> None:
    with pytest.raises(ConfigError, match="--lora-modules"):
        lora_modules(values)


def test_serve_defaults_to_the_demo_model(served: list[ServerConfig]) -> None:
    assert command.run(["serve"]) == 0
    (config,) = served
    assert config.engine.model == str(DEMO_MODEL_DIR)
    assert config.engine.served_model_name == DEMO_MODEL_NAME
    assert (config.host, config.port, config.grpc_port) == ("127.0.0.1", 8000, 50051)
    assert Path(config.state_dir).is_absolute()


def test_serve_reads_its_flags(served: list[ServerConfig], tmp_path: Path) -> None:
    flags = (
        "--port 0 --metrics-port 0 --max-num-seqs 4 --kv-cache-memory-bytes 64MiB --no-enable-prefix-caching "
        "--max-lora-rank 32 --dtype bfloat16 --slo-tpot-ms 40 --served-model-name mine --api-key one "
        f"--api-key two --admin-api-key boss --adapter-root {tmp_path} --lora-modules style={tmp_path} "
        f"--state-dir {tmp_path}/state"
    )
    assert command.run(["serve", str(tmp_path), *flags.split()]) == 0
    (config,) = served
    assert config.engine.model == str(tmp_path)
    assert config.engine.served_model_name == "mine"
    assert config.engine.kv_cache_memory_bytes == 64 * 2**20
    assert (config.engine.max_num_seqs, config.engine.max_lora_rank, config.engine.dtype) == (
        4,
        32,
        "bfloat16",
    )
    assert config.engine.enable_prefix_caching is False
    assert config.engine.slo_tpot_ms == 40.0
    assert config.api_keys == ("one", "two") and config.admin_api_keys == ("boss",)
    assert config.adapter_roots == (str(tmp_path),)
    assert config.lora_modules == (LoraModule("style", str(tmp_path)),)
    assert (config.port, config.metrics_port) == (0, 0)


def test_serve_takes_keys_from_the_environment(
    served: list[ServerConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nobody after it finds them there; a flag comes before."""
    for name, other in (("COSERVE_API_KEY", "VLLM_API_KEY"), ("VLLM_API_KEY", "COSERVE_API_KEY")):
        monkeypatch.delenv(other, raising=False)
        monkeypatch.setenv(name, "one two")
        monkeypatch.setenv("COSERVE_ADMIN_API_KEY", "boss")
        assert command.run(["serve"]) == 0
        assert served[-1].api_keys == ("one", "two") and served[-1].admin_api_keys == ("boss",)
        assert name not in os.environ and "COSERVE_ADMIN_API_KEY" not in os.environ
    monkeypatch.setenv("VLLM_API_KEY", "one")
    assert command.run(["serve", "--api-key", "three"]) == 0
    assert served[-1].api_keys == ("three",) and served[-1].admin_api_keys == ()


def test_allowed_origins(served: list[ServerConfig], capsys: pytest.CaptureFixture[str]) -> None:
    assert command.run(["serve", "--allowed-origins", '["https://a.example"]', "--http-timeout", "5"]) == 0
    assert served[-1].allowed_origins == ("https://a.example",) and served[-1].http_timeout == 5.0
    for wrong in ("https://a.example", "{}", "[1]", "["):
        assert command.run(["serve", "--allowed-origins", wrong]) == 2
        assert "--allowed-origins" in capsys.readouterr().err


def test_a_model_directory_names_itself(tmp_path: Path) -> None:
    folder = tmp_path / "tiny-model"
    folder.mkdir()
    assert serve.find_model(str(folder)) == (folder, "tiny-model")


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("", 2, "Missing command"),
        ("fly", 2, "fly"),
        ("jobs", 2, "Missing command"),
        ("serve --bogus 1", 2, "--bogus"),
        ("serve --port 70000", 2, "--port"),
        ("serve --port many", 2, "--port"),
        ("serve --max-num-seqs 0", 2, "--max-num-seqs"),
        ("serve --max-num-queued-reqs -1", 2, "--max-num-queued-reqs"),
        ("serve --slo-tpot-ms -5", 2, "--slo-tpot-ms"),
        ("serve --slo-tpot-ms nan", 2, "--slo-tpot-ms"),
        ("serve --slo-ttft-ms inf", 2, "--slo-ttft-ms inf"),
        ("serve --slo-ttft-ms soon", 2, "--slo-ttft-ms"),
        ("serve --min-training-share 1", 2, "--min-training-share"),
        ("serve --kv-cache-memory-bytes lots", 2, "--kv-cache-memory-bytes"),
        ("serve --lora-modules x", 2, "--lora-modules"),
        ("serve --adapter-root /no/such/dir", 2, "--adapter-root"),
        ("serve --chat-template /no/such/file", 2, "--chat-template"),
        ("serve --ssl-keyfile /dev/null", 2, "--ssl-certfile"),
        ("serve --ssl-cert-reqs 2", 2, "--ssl-keyfile"),
        ("serve --enable-ssl-refresh", 2, "--enable-ssl-refresh"),
        (f"{SECURE} --ssl-cert-reqs 2", 2, "give --ssl-ca-certs"),
        (f"{SECURE} --ssl-cert-reqs 3", 2, "--ssl-cert-reqs"),
        (f"{SECURE} --ssl-ca-certs {__file__}", 2, "add --ssl-cert-reqs 2"),
        (f"{SECURE} --ssl-ca-certs /no/such --ssl-cert-reqs 2", 2, "--ssl-ca-certs /no/such"),
        ("jobs list --client-cert /dev/null", 2, "--client-cert"),
        ("serve /no/such/model", 2, "/no/such/model"),
        ("serve a --model b", 2, "--model b"),
        ("finetune data.jsonl", 2, "--adapter"),
        ("finetune /no/such.jsonl --adapter a", 2, "/no/such.jsonl"),
        (f"finetune {__file__} --adapter a --rank 0", 2, "--rank"),
        (f"finetune {__file__} --adapter a --validation-data /no/such", 2, "--validation-data /no/such"),
        (f"finetune {__file__} --adapter a --grpc {NOWHERE}", 1, "coserve serve"),
        (f"jobs list --grpc {NOWHERE}", 1, NOWHERE),
        (f"jobs get ftjob-1 --grpc {NOWHERE}", 1, NOWHERE),
        (f"adapters list --grpc {NOWHERE}", 1, NOWHERE),
        ("adapters download a /tmp", 2, "/tmp"),
        (f"chat hello --url http://{NOWHERE}", 1, NOWHERE),
        ("bench nothing", 2, "nothing"),
    ],
)
def test_refusals_are_one_line(capsys: pytest.CaptureFixture[str], line: str, code: int, words: str) -> None:
    assert command.run(line.split()) == code
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("coserve: ") and said.err.count("\n") == 1
    assert words in said.err


def test_an_interrupt_exits_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(serve, "server_config", interrupted)
    assert command.run(["serve"]) == 128 + signal.SIGINT


def test_the_server_s_exit_code_is_the_command_s(served: list[ServerConfig]) -> None:
    sys.modules["coserve.server.main"].run_server = lambda _: 2  # type: ignore[attr-defined]
    assert command.run(["serve"]) == 2


Parts = tuple[dict[str, Any], dict[str, Any], dict[str, Any]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Parts]:
    """What `coserve finetune` with these flags would ask of a server."""
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(sys.modules["coserve.cli.finetune"], "_run", seen.append)

    def ask(line: str) -> Parts:
        assert command.run(["finetune", __file__, "--adapter", "a", *line.split()]) == 0
        return settings(seen[-1])

    return ask


def test_settings_not_given_stay_absent(asked: Callable[[str], Parts]) -> None:
    lora, training, rest = asked("")
    assert (lora, training) == ({}, {})
    job = {"model": "", "adapter": "a", "method": "supervised", "init_from": "", "priority": 0}
    assert rest == {**job, "metadata": {}}
    line = "--rank 8 --target-modules q_proj,v_proj --epochs 2 --max-grad-norm 0 --seed 0 --tag team=red"
    lora, training, rest = asked(line)
    assert lora == {"r": 8, "target_modules": ["q_proj", "v_proj"]}
    assert training == {"n_epochs": 2, "max_grad_norm": 0.0}
    assert (rest["seed"], rest["metadata"]) == (0, {"team": "red"})


def test_switches_and_what_is_left_to_the_server(asked: Callable[[str], Parts]) -> None:
    lora, training, _ = asked("--freeze-a --use-rslora --exclude-modules q_proj --packing --auto --epochs 2")
    assert lora == {"freeze_a": True, "use_rslora": True, "exclude_modules": ["q_proj"]}
    auto = ["batch_size", "learning_rate_multiplier"]
    assert training == {"packing": True, "n_epochs": 2, "auto": auto}
    _, training, rest = asked("--method dpo --beta 0.3")
    assert (training, rest["method"]) == ({"beta": 0.3}, "dpo")
    assert asked("--auto")[1] == {"auto": ["n_epochs", *auto]}


def test_every_flag_sets_a_field_of_the_request() -> None:
    from coserve.server.grpc_gen import fine_tuning_pb2 as pb

    for names, message in (
        ([*flags.LORA_FIELDS.values(), *flags.MODULE_FIELDS], pb.LoraConfig),
        ([*flags.TRAINING_FIELDS.values(), "auto"], pb.TrainingConfig),
        ([*flags.JOB_FIELDS, "seed", "metadata"], pb.CreateJobRequest),
    ):
        assert set(names) <= set(message.DESCRIPTOR.fields_by_name)


@dataclass
class Step:
    """As much of a metrics event as the progress reads."""

    step: int
    seconds: float
    valid_loss: float | None = None
    total_steps: int = 3
    loss: float = 2.0
    tokens_per_second: float = 250.4
    type: str = "metrics"

    def HasField(self, name: str) -> bool:
        return getattr(self, name) is not None


def test_progress_tells_losses_pace_and_what_is_left() -> None:
    console = Console(file=io.StringIO(), force_terminal=False)
    with JobView("job", console) as view:
        for event in (Step(1, 100.0), Step(2, 200.0, valid_loss=1.5), Step(3, 100.0)):
            view.show(event)
    assert console.file.getvalue().splitlines() == [  # type: ignore[attr-defined]
        "step 1/3 loss 2.0000 250 tok/s eta 3:20",
        "step 2/3 loss 2.0000 valid 1.5000 250 tok/s eta 1:50",
        "step 3/3 loss 2.0000 valid 1.5000 250 tok/s",
    ]


@pytest.mark.parametrize(("seconds", "shown"), [(0.4, "0:00"), (75, "1:15"), (11_100, "3:05:00")])
def test_durations(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_help_and_version_import_nothing_heavy() -> None:
    program = (
        "import sys; from coserve.cli.main import run; code = run(['--help']) or run(['serve', '--help']);"
        "heavy = {'torch', 'transformers', 'grpc', 'fastapi', 'numpy', 'httpx'} & set(sys.modules);"
        "sys.exit(code or ', '.join(sorted(heavy)) or 0)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "finetune" in ended.stdout
