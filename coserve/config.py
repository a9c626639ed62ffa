"""Configuration: frozen dataclasses made once from the command line. Nothing reads the environment later."""

from __future__ import annotations

from pathlib import Path

import msgspec

# Freed workspaces are kept, on huge pages, with room above them: a warm step asks the system for no memory.
ALLOCATOR = (
    "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=17179869184"
    ":glibc.malloc.top_pad=268435456"
)


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """All that the engine process needs to know, sent to it as JSON at its start.

    `tokenizer` is a directory with one in place of the model's; "" is the model's own.
    `dtype` is "auto" (fp32 for the demo model and fp32 checkpoints, else bf16), "float32" or "bfloat16".
    `kv_cache_memory_bytes` 0 derives the pool's size from `gpu_memory_utilization` of the free memory.
    `max_num_queued_reqs` bounds the requests that wait for a place in a step; 0: any number may.
    `max_cpu_lora_memory_bytes` bounds adapters in host memory beside their count; 0: an eighth of all memory.
    `latency_file` holds what was learnt of this machine's costs at the last start, if it is there.
    `min_training_share` is what jobs get of the time at least, 0 to 0.9, whatever the latency targets.
    `deterministic` asks a GPU for products whose rows don't depend on the batch; a CPU's never do.
    """

    model: str
    tokenizer: str = ""
    served_model_name: str = ""
    device: str = "auto"
    dtype: str = "auto"
    max_model_len: int = 0
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    max_num_queued_reqs: int = 0
    block_size: int = 16
    gpu_memory_utilization: float = 0.9
    kv_cache_memory_bytes: int = 0
    enable_prefix_caching: bool = True
    max_loras: int = 16
    max_lora_rank: int = 64
    max_cpu_loras: int = 128
    max_cpu_lora_memory_bytes: int = 0
    slo_tpot_ms: float = 0.0
    slo_ttft_ms: float = 0.0
    min_training_share: float = 0.0
    deterministic: bool = False
    seed: int = 0
    log_file: str = ""
    latency_file: str = ""


class LoraModule(msgspec.Struct, frozen=True):
    """An adapter to load at the start: a PEFT directory, and whether it is to stay on the device."""

    name: str
    path: str
    pinned: bool = False


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The API server's own settings; `engine` goes on to the engine process.

    `served_model_names` are further names of the base model, `generation_config` is "auto" (the model's own
    sampling defaults), "vllm" (none), or a directory that has them. `force_include_usage` ends every stream
    with its usage, asked for or not. `max_logprobs` -1 lets a request have those of the whole vocabulary.
    `stream_interval` is the tokens of one chunk of a stream, `sse_keep_alive_interval` the seconds after
    which a silent one gets a comment.
    """

    engine: EngineConfig
    host: str = "127.0.0.1"
    port: int = 8000
    grpc_port: int = 50051
    metrics_port: int | None = None
    state_dir: str = ""
    adapter_roots: tuple[str, ...] = ()
    lora_modules: tuple[LoraModule, ...] = ()
    enable_live_adapters: bool = False
    chat_template: str = ""
    served_model_names: tuple[str, ...] = ()
    generation_config: str = "auto"
    force_include_usage: bool = False
    log_level: str = "info"
    max_logprobs: int = 20
    stream_interval: int = 1
    sse_keep_alive_interval: float = 0.0
    trust_request_chat_template: bool = False
    response_role: str = "assistant"
    enable_auto_tool_choice: bool = True
    tool_call_parser: str = "auto"
    reasoning_parser: str = "auto"
    api_keys: tuple[str, ...] = ()
    admin_api_keys: tuple[str, ...] = ()
    keys_file: str = ""
    ssl_keyfile: str = ""
    ssl_certfile: str = ""
    ssl_ca_certs: str = ""
    ssl_cert_reqs: int = 0
    enable_ssl_refresh: bool = False
    shutdown_timeout: float = 25.0
    http_timeout: float = 60.0
    allowed_origins: tuple[str, ...] = ()


DEMO_MODEL_NAME = "coserve-demo"
DEMO_MODEL_DIR = Path(__file__).parent / "assets" / "demo_model"
