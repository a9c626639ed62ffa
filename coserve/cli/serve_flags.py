"""The flags of `coserve serve`: type, limits and help of each. Names are vLLM's where it has one."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[
    str | None, typer.Argument(metavar="MODEL", help="A model's directory or hub id [the demo model].")
]
ModelOption = Annotated[
    str | None, typer.Option("--model", metavar="MODEL", help="The same as the argument.")
]
ServedModelName = Annotated[
    list[str] | None, typer.Option(help="The base model's name; repeatable, answers carry the first.")
]
TokenizerDir = Annotated[
    str, typer.Option("--tokenizer", metavar="DIR", help="A directory with one, in place of the model's.")
]
Revision = Annotated[str, typer.Option(help="Branch, tag or commit of a hub id.")]
DownloadDir = Annotated[str, typer.Option(metavar="DIR", help="Where a hub id's files are kept.")]
GenerationConfig = Annotated[
    str,
    typer.Option(metavar="auto|vllm|DIR", help="Sampling defaults: the model's, none, or DIR's."),
]
LogLevel = Annotated[
    str,
    typer.Option(
        "--uvicorn-log-level", "--log-level", metavar="debug|info|warning|error", help="What the log says."
    ),
]
ForceUsage = Annotated[
    bool, typer.Option("--enable-force-include-usage", help="End every stream with its usage.")
]
Host = Annotated[str, typer.Option(help="Address to listen on.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="HTTP port; 0 takes a free one.")]
GrpcPort = Annotated[int, typer.Option(min=0, max=65535, help="gRPC port; 0 takes a free one.")]
MetricsPort = Annotated[
    int | None, typer.Option(min=0, max=65535, help="Serve /metrics on this port too, without keys.")
]
Device = Annotated[str, typer.Option(metavar="auto|cpu|cuda", help="Where to compute.")]
Dtype = Annotated[str, typer.Option(metavar="auto|float32|bfloat16", help="Precision of the base weights.")]
MaxModelLen = Annotated[int, typer.Option(min=0, help="Context in tokens; 0 is the model's own.")]
MaxNumSeqs = Annotated[int, typer.Option(min=1, help="Requests that run at the same time.")]
MaxNumBatchedTokens = Annotated[int, typer.Option(min=16, help="Tokens of one step.")]
MaxNumQueuedReqs = Annotated[
    int, typer.Option(min=0, help="Requests that may wait; more are refused. 0 is any number.")
]
BlockSize = Annotated[int, typer.Option(min=1, max=256, help="Tokens of one KV block.")]
GpuMemoryUtilization = Annotated[
    float, typer.Option(min=0.05, max=1.0, help="Share of the free memory that the pool takes.")
]
KvCacheMemory = Annotated[
    str, typer.Option(metavar="SIZE", help="The pool's size, such as 512MiB; 0 goes by the share.")
]
EnablePrefixCaching = Annotated[bool, typer.Option(help="Keep the KV of shared prefixes.")]
MaxLoras = Annotated[int, typer.Option(min=1, help="Adapters on the device at once.")]
MaxLoraRank = Annotated[int, typer.Option(min=1, max=512, help="Highest rank of an adapter.")]
MaxCpuLoras = Annotated[int, typer.Option(min=1, help="Adapters kept in host memory.")]
MaxCpuLoraMemory = Annotated[
    str, typer.Option(metavar="SIZE", help="Bytes of these, such as 4GiB; 0 is an eighth of all memory.")
]
LoraModules = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=PATH|JSON", help="An adapter to load at the start; repeatable."),
]
AdapterRoot = Annotated[
    list[str] | None, typer.Option(metavar="DIR", help="A folder that clients may load from; repeatable.")
]
EnableLiveAdapters = Annotated[
    bool,
    typer.Option("--enable-live-adapters", help="Let JOB:live answer with a job's adapter while it trains."),
]
ChatTemplate = Annotated[str, typer.Option(metavar="FILE", help="A Jinja template in place of the model's.")]
MaxLogprobs = Annotated[
    int, typer.Option(min=-1, help="Log-probabilities that a request may have a token; -1: of all tokens.")
]
KeepAlive = Annotated[
    float, typer.Option(min=0.0, help="Seconds after which a silent stream gets a comment; 0 is never.")
]
StreamInterval = Annotated[int, typer.Option(min=1, help="Tokens of one chunk of a stream.")]
TrustRequestChatTemplate = Annotated[
    bool, typer.Option("--trust-request-chat-template", help="Let requests bring a chat template.")
]
ResponseRole = Annotated[str, typer.Option(help="The role that answers have.")]
EnableAutoToolChoice = Annotated[bool, typer.Option(help="Let models choose whether to call tools.")]
ToolCallParser = Annotated[
    str, typer.Option(metavar="auto|none|NAME", help="How calls are written; auto: by the template.")
]
ReasoningParser = Annotated[
    str, typer.Option(metavar="auto|none|NAME", help="How reasoning is marked; auto: by the template.")
]
KEY_VARIABLES = ("COSERVE_API_KEY", "VLLM_API_KEY", "COSERVE_ADMIN_API_KEY")
ApiKey = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY", envvar=list(KEY_VARIABLES[:2]), help="A key that may chat; repeatable."),
]
AdminApiKey = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY", envvar=KEY_VARIABLES[2], help="A key that may do all; repeatable."),
]
AllowedOrigins = Annotated[
    str, typer.Option(metavar="JSON", help='Web pages that may call: ["https://..."], or ["*"] for all.')
]
HttpTimeout = Annotated[
    float,
    typer.Option(min=0.0, help="Seconds that a client may stall in, sending (HTTP) or reading; 0: any."),
]
KeysFile = Annotated[
    str, typer.Option(metavar="FILE", help="Keys with roles, limits and latency classes: TOML or JSON.")
]
SslKeyfile = Annotated[str, typer.Option(metavar="FILE", help="TLS key.")]
SslCertfile = Annotated[str, typer.Option(metavar="FILE", help="TLS certificate.")]
SslCaCerts = Annotated[str, typer.Option(metavar="FILE", help="CA that signs clients' certificates.")]
SslCertReqs = Annotated[
    int, typer.Option(min=0, max=2, help="Clients' certificates: 0 not asked for, 1 optional, 2 required.")
]
EnableSslRefresh = Annotated[
    bool, typer.Option("--enable-ssl-refresh", help="Read the TLS files again when they change.")
]
StateDir = Annotated[str, typer.Option(metavar="DIR", help="Where files, jobs and adapters are kept.")]
ShutdownTimeout = Annotated[float, typer.Option(min=0.0, help="Seconds that running streams get on SIGTERM.")]
SloTtftMs = Annotated[float, typer.Option(min=0.0, help="Target for the first token; 0 is automatic.")]
SloTpotMs = Annotated[float, typer.Option(min=0.0, help="Target for each further token; 0 is automatic.")]
MinTrainingShare = Annotated[
    float, typer.Option(min=0.0, max=0.9, help="Of the time, for jobs whatever the targets; 0 is none.")
]
Deterministic = Annotated[
    bool, typer.Option("--deterministic", help="On a GPU: the same bits whatever shares the batch.")
]
Seed = Annotated[int, typer.Option(help="Draws the seeds of requests that bring none; 0 draws anew.")]
