"""`coserve serve`: read the flags once into a ServerConfig and run the server in the foreground."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from coserve.cli import serve_flags as flags
from coserve.cli.values import existing_dir, existing_file, lora_modules, size_in_bytes
from coserve.config import DEMO_MODEL_DIR, DEMO_MODEL_NAME, EngineConfig, ServerConfig
from coserve.errors import ConfigError
from coserve.server.application import reasoning
from coserve.server.application.tool_calling import formats

DEFAULT_STATE_DIR = "~/.local/state/coserve"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_LOG_LEVELS = ("debug", "info", "warning", "error")
_MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]


def serve(
    model: flags.Model = None,
    model_option: flags.ModelOption = None,
    served_model_name: flags.ServedModelName = None,
    tokenizer: flags.TokenizerDir = "",
    revision: flags.Revision = "",
    download_dir: flags.DownloadDir = "",
    generation_config: flags.GenerationConfig = "auto",
    host: flags.Host = "127.0.0.1",
    port: flags.Port = 8000,
    grpc_port: flags.GrpcPort = 50051,
    metrics_port: flags.MetricsPort = None,
    device: flags.Device = "auto",
    dtype: flags.Dtype = "auto",
    max_model_len: flags.MaxModelLen = 0,
    max_num_seqs: flags.MaxNumSeqs = 256,
    max_num_batched_tokens: flags.MaxNumBatchedTokens = 2048,
    max_num_queued_reqs: flags.MaxNumQueuedReqs = 0,
    block_size: flags.BlockSize = 16,
    gpu_memory_utilization: flags.GpuMemoryUtilization = 0.9,
    kv_cache_memory_bytes: flags.KvCacheMemory = "0",
    enable_prefix_caching: flags.EnablePrefixCaching = True,
    max_loras: flags.MaxLoras = 16,
    max_lora_rank: flags.MaxLoraRank = 64,
    max_cpu_loras: flags.MaxCpuLoras = 128,
    max_cpu_lora_memory_bytes: flags.MaxCpuLoraMemory = "0",
    lora_modules: flags.LoraModules = None,
    adapter_root: flags.AdapterRoot = None,
    enable_live_adapters: flags.EnableLiveAdapters = False,
    chat_template: flags.ChatTemplate = "",
    force_include_usage: flags.ForceUsage = False,
    log_level: flags.LogLevel = "info",
    max_logprobs: flags.MaxLogprobs = 20,
    sse_keep_alive_interval: flags.KeepAlive = 0.0,
    stream_interval: flags.StreamInterval = 1,
    trust_request_chat_template: flags.TrustRequestChatTemplate = False,
    response_role: flags.ResponseRole = "assistant",
    enable_auto_tool_choice: flags.EnableAutoToolChoice = True,
    tool_call_parser: flags.ToolCallParser = "auto",
    reasoning_parser: flags.ReasoningParser = "auto",
    api_key: flags.ApiKey = None,
    admin_api_key: flags.AdminApiKey = None,
    keys_file: flags.KeysFile = "",
    ssl_keyfile: flags.SslKeyfile = "",
    ssl_certfile: flags.SslCertfile = "",
    ssl_ca_certs: flags.SslCaCerts = "",
    ssl_cert_reqs: flags.SslCertReqs = 0,
    enable_ssl_refresh: flags.EnableSslRefresh = False,
    allowed_origins: flags.AllowedOrigins = "[]",
    http_timeout: flags.HttpTimeout = 60.0,
    state_dir: flags.StateDir = DEFAULT_STATE_DIR,
    shutdown_timeout: flags.ShutdownTimeout = 25.0,
    slo_ttft_ms: flags.SloTtftMs = 0.0,
    slo_tpot_ms: flags.SloTpotMs = 0.0,
    min_training_share: flags.MinTrainingShare = 0.0,
    deterministic: flags.Deterministic = False,
    seed: flags.Seed = 0,
) -> None:
    """Serve a model over HTTP (OpenAI's API) and gRPC, and fine-tune adapters of it beside that."""
    config = server_config(dict(locals()))
    for name in flags.KEY_VARIABLES:
        os.environ.pop(name, None)  # the engine and its children needn't have them
    from coserve.server.main import run_server

    raise typer.Exit(run_server(config) or 0)


def server_config(given: Mapping[str, Any]) -> ServerConfig:
    """The configuration that the flags' values describe; ConfigError names a flag that can't be honoured."""
    _check_files(given)
    for name in ("slo_ttft_ms", "slo_tpot_ms"):
        if not math.isfinite(given[name]):
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag} {given[name]}: give milliseconds, or 0 for automatic.", param=name)
    if given["log_level"] not in _LOG_LEVELS:
        raise ConfigError(
            f"--uvicorn-log-level {given['log_level']}: must be one of {', '.join(_LOG_LEVELS)}.",
            param="log_level",
        )
    if given["generation_config"] not in ("auto", "vllm"):
        existing_dir(given["generation_config"], "--generation-config")
    formats.choose(given["tool_call_parser"], None)
    reasoning.choose(given["reasoning_parser"], None)
    model = _one_model(given["model"], given["model_option"])
    directory, name = find_model(model, given["revision"], given["download_dir"])
    names = tuple(dict.fromkeys(given["served_model_name"] or (name,)))
    if not all(names):
        raise ConfigError("--served-model-name: a name can't be empty.", param="served_model_name")
    changed = {
        "model": str(directory),
        "tokenizer": str(existing_dir(given["tokenizer"], "--tokenizer")) if given["tokenizer"] else "",
        "served_model_name": names[0],
        "served_model_names": names[1:],
        "kv_cache_memory_bytes": size_in_bytes(given["kv_cache_memory_bytes"], "--kv-cache-memory-bytes"),
        "max_cpu_lora_memory_bytes": size_in_bytes(
            given["max_cpu_lora_memory_bytes"], "--max-cpu-lora-memory-bytes"
        ),
        "state_dir": str(Path(given["state_dir"]).expanduser().resolve()),
        "adapter_roots": _directories(given["adapter_root"] or (), "--adapter-root"),
        "lora_modules": lora_modules(given["lora_modules"] or ()),
        "api_keys": tuple(given["api_key"] or ()),
        "admin_api_keys": tuple(given["admin_api_key"] or ()),
        "allowed_origins": _origins(given["allowed_origins"]),
    }
    values = {**given, **changed}
    engine = EngineConfig(**_fields(EngineConfig, values))
    return ServerConfig(engine=engine, **_fields(ServerConfig, values))


def find_model(given: str | None, revision: str = "", download_dir: str = "") -> tuple[Path, str]:
    """The model's directory and its name in requests; a hub id (of a `revision`) is fetched unless it is in
    the local cache, or in `download_dir`.

    Raises ConfigError when there is neither such a directory nor such an id.
    """
    is_hub_id = given is not None and given != DEMO_MODEL_NAME and not Path(given).expanduser().is_dir()
    for flag, value in (("--revision", revision), ("--download-dir", download_dir)):
        if value and not is_hub_id:
            raise ConfigError(f"{flag} {value}: goes with a hub id, and this model is on disk.", param=flag)
    if given is None or given == DEMO_MODEL_NAME:
        return DEMO_MODEL_DIR, DEMO_MODEL_NAME
    directory = Path(given).expanduser()
    if directory.is_dir():
        return directory.resolve(), directory.resolve().name
    if _HUB_ID.fullmatch(given) is None:
        raise ConfigError(f"model {given}: no such directory, and a hub id reads OWNER/NAME.", param="model")
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(
            given, revision=revision or None, cache_dir=download_dir or None, allow_patterns=_MODEL_FILES
        )
        return Path(folder), given
    except Exception as error:  # the hub client raises a dozen kinds, all meaning the same to the user
        raise ConfigError(
            f"model {given}: no such directory, and the hub doesn't give it ({type(error).__name__}).",
            param="model",
        ) from None


def _one_model(argument: str | None, option: str | None) -> str | None:
    if argument and option and argument != option:
        raise ConfigError(f"--model {option}: the argument says {argument}; give one of them.", param="model")
    return argument or option


def _check_files(given: Mapping[str, Any]) -> None:
    if bool(given["ssl_keyfile"]) != bool(given["ssl_certfile"]):
        raise ConfigError("--ssl-keyfile and --ssl-certfile go together; give both.", param="ssl_keyfile")
    _check_tls(given)
    for name in ("chat_template", "keys_file", "ssl_keyfile", "ssl_certfile", "ssl_ca_certs"):
        if given[name]:
            existing_file(given[name], "--" + name.replace("_", "-"))


def _check_tls(given: Mapping[str, Any]) -> None:
    """Refuse what would have no effect: nobody should believe that clients are asked for certificates."""
    for name in ("ssl_ca_certs", "ssl_cert_reqs", "enable_ssl_refresh"):
        if given[name] and not given["ssl_certfile"]:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag} goes with --ssl-keyfile and --ssl-certfile; give both.", param=name)
    if given["ssl_cert_reqs"] and not given["ssl_ca_certs"]:
        raise ConfigError(
            "--ssl-cert-reqs asks clients for certificates: give --ssl-ca-certs with the CA that signs them.",
            param="ssl_cert_reqs",
        )
    if given["ssl_ca_certs"] and not given["ssl_cert_reqs"]:
        raise ConfigError(
            "--ssl-ca-certs alone asks nobody for a certificate: add --ssl-cert-reqs 2 to refuse clients "
            "that have none.",
            param="ssl_ca_certs",
        )


def _origins(text: str) -> tuple[str, ...]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, list) or not all(isinstance(origin, str) for origin in found):
        raise ConfigError(
            f"--allowed-origins {text}: give a JSON list such as '[\"https://example.com\"]'.",
            param="allowed_origins",
        )
    return tuple(found)


def _directories(paths: Sequence[str], flag: str) -> tuple[str, ...]:
    return tuple(str(existing_dir(path, flag)) for path in paths)


def _fields(kind: type[EngineConfig] | type[ServerConfig], values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: values[name] for name in kind.__struct_fields__ if name in values}
