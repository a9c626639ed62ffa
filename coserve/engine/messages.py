"""Everything that crosses between the API server and the engine process.

One msgspec struct a message, tagged by its class name. `ToEngine` and `FromEngine` are the two unions;
`encode`/`decode_*` are the only (de)serialisers. Token ids, bytes and numbers only: text stays in the server.
"""

from __future__ import annotations

import msgspec

from coserve.core.sampling_params import SamplingParams
from coserve.core.slo import LatencyTargets
from coserve.errors import CoserveError, DatasetError, InternalError, InvalidRequest, RateLimited, Unavailable
from coserve.training.job import JobSpec, StepMetrics
from coserve.training.model_calls import CallResult, ModelCall


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """Base of all messages."""


class AdapterRef(msgspec.Struct, frozen=True):
    """An immutable adapter version: `digest` names its bytes, `path` is its PEFT directory on disk."""

    name: str
    version: int
    digest: str
    path: str


# ------------------------------------------------------------------ server -> engine


class AddRequest(Message):
    """Admit a request. The first output of a refused one is a `RequestOutput` with `error` set.

    `live_job` asks for the adapter of a job in training, as of its last committed step. `targets` are its
    latency class's where those aren't the server's own, `tenant` (a key's digest) and `weight` whose share it
    is served from. Cached prefixes are shared among requests with the same `cache_salt`.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    adapter: AdapterRef | None = None
    live_job: str = ""
    priority: int = 0
    targets: LatencyTargets | None = None
    tenant: str = ""
    weight: float = 1.0
    arrival: float = 0.0  # time.time() at the server
    cache_salt: str = ""


class AbortRequests(Message):
    """Forget these requests and free all they hold before the next step."""

    request_ids: list[str]


class LoadAdapter(Message):
    """Bring an adapter's weights to the device; answered by a `Reply` with the same `call_id`. With `job_id`
    it is what that job has ended with, whose rows may still be there."""

    call_id: int
    adapter: AdapterRef
    pinned: bool = False
    job_id: str = ""


class UnloadAdapter(Message):
    """Free an adapter's weights once its last request has ended; answered at once by a `Reply`."""

    call_id: int
    digest: str


class SubmitJob(Message):
    """Start a fine-tuning job, or go on with it from its newest whole checkpoint."""

    call_id: int
    spec: JobSpec


class ControlJob(Message):
    """Pause, resume or cancel a job; answered by a `Reply` when it has taken effect."""

    call_id: int
    job_id: str
    action: str  # "pause" | "resume" | "cancel"


class OpenModel(Message):
    """A new model that is trained by calls; the `Reply` comes once there is a place for it. Of its `spec`
    identity, LoRA settings, seed and share matter."""

    call_id: int
    spec: JobSpec


class CallModel(Message):
    """A pass, an update, a save or a load. Calls to one model are done in the order in which they come; each
    is answered by a `ModelResult`, or by a `Reply` with what went wrong."""

    call_id: int
    model_id: str
    call: ModelCall


class CloseModel(Message):
    """Forget a model and all that was asked of it; answered by a `Reply`."""

    call_id: int
    model_id: str


class GetStats(Message):
    """Ask for an `EngineStats` now."""

    call_id: int


class Shutdown(Message):
    """Checkpoint all running jobs at their last committed step, answer with a `Reply`, and exit."""

    call_id: int


ToEngine = (
    AddRequest
    | AbortRequests
    | LoadAdapter
    | UnloadAdapter
    | SubmitJob
    | ControlJob
    | OpenModel
    | CallModel
    | CloseModel
    | GetStats
    | Shutdown
)


# ------------------------------------------------------------------ engine -> server


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability of one token, its rank in the vocabulary (1 = most likely), and the best ones."""

    token_id: int
    logprob: float
    rank: int
    top: list[tuple[int, float]]


class Fault(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An error of the tree: `kind` is its class's word, `code` its own, `retry_after` in seconds where it
    is one that passes."""

    message: str
    kind: str
    code: str
    param: str | None = None
    retry_after: float = 0.0

    @classmethod
    def of(cls, error: CoserveError) -> Fault:
        """What is told of an error."""
        passes = isinstance(error, RateLimited | Unavailable)
        return cls(
            message=error.message,
            kind=error.kind,
            code=error.code,
            param=error.param,
            retry_after=error.retry_after if passes else 0.0,
        )

    def to_error(self) -> CoserveError:
        """The error that was told of: its class by its kind, its code as it was."""
        pending: list[type[CoserveError]] = [CoserveError]
        while pending:
            found = pending.pop()
            pending.extend(found.__subclasses__())
            if found is CoserveError or found.default_code != self.kind:
                continue
            if issubclass(found, DatasetError):  # its lines stay where they were read
                found = InvalidRequest
            if issubclass(found, RateLimited | Unavailable):
                return found(self.message, param=self.param, code=self.code, retry_after=self.retry_after)
            return found(self.message, param=self.param, code=self.code)
        return InternalError(self.message, param=self.param, code=self.code)


class RequestOutput(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one step gave one request.

    `finish_reason` is "stop", "length", "abort" or "error" on the last one, with `stop_token_id` for a stop
    by token. `prompt_logprobs` comes once, with the first output; its first entry is None.
    """

    request_id: str
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] = []
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: str | None = None
    stop_token_id: int | None = None
    error: Fault | None = None
    cached_tokens: int = 0
    num_preemptions: int = 0
    scheduled_at: float | None = None  # time.time() of the first step with a token of it; first output only
    snapshot: str | None = None  # "JOB:live@STEP" that a live request reads; first output only


class StepOutputs(Message):
    """All outputs of one step."""

    outputs: list[RequestOutput]


class Reply(Message):
    """Answer to a call; `error` is None when it worked."""

    call_id: int
    error: Fault | None = None


class ModelResult(Message):
    """What came of a `CallModel`."""

    call_id: int
    result: CallResult


class JobProgress(Message):
    """One committed optimizer step of a job. After a restart steps may come again: same step, same bits."""

    job_id: str
    metrics: StepMetrics


class JobCheckpoint(Message):
    """A checkpoint is durable on disk under `path` (a directory named by its step). `kept` are the steps
    that have one now; the engine has removed the others."""

    job_id: str
    step: int
    path: str
    train_loss: float
    kept: list[int]


class JobMessage(Message):
    """Something to know about a job, `level` "info" or "warn". It may come again after a restart."""

    job_id: str
    level: str
    text: str


class JobStatus(Message):
    """A job's state in the engine changed: "queued", "running", "paused", "succeeded", "failed", "cancelled".
    `message` says what failed, or what a queued job waits for.

    "succeeded" comes after the `JobCheckpoint` of the last step, with the directory of the checkpoint to be
    published.
    """

    job_id: str
    status: str
    message: str = ""
    error_code: str | None = None
    error_param: str | None = None
    result_path: str = ""


class EngineReady(Message):
    """Sent once when the model is loaded."""

    pid: int
    model_name: str
    max_model_len: int
    vocab_size: int
    num_blocks: int
    block_size: int
    device: str
    dtype: str
    memory_limit_bytes: int = 0  # of the device, or what this process may use of the machine's
    job_memory_bytes: int | None = None  # that jobs may hold outside the pool; None: no bound is known


class StepTiming(msgspec.Struct, frozen=True, array_like=True):
    """One step for the histograms. Seconds; tokens by kind; `predicted` is of the `forward`, the batch that
    requests are in, and 0 when there was no prediction."""

    kind: str  # "inference" | "training" | "mixed"
    seconds: float
    budget: float
    predicted: float
    forward: float
    training_seconds: float
    inference_tokens: int


class EngineStats(Message):
    """A snapshot of gauges, and what was counted since the one before. `call_id` 0: periodic."""

    call_id: int = 0
    running: int = 0
    waiting: int = 0
    waiting_deferred: int = 0  # waiting for an adapter's load or a grammar's compilation
    kv_usage: float = 0.0
    memory_bytes: dict[str, int] = {}  # by owner; they sum to the two below
    resident_bytes: int = 0
    untouched_bytes: int = 0  # of the pool
    adapter_tiers: dict[str, str] | None = None  # digest -> "device" | "host"; None: as they were
    running_adapters: dict[str, int] = {}  # requests by their adapter's name
    waiting_adapters: dict[str, int] = {}
    least_targets: LatencyTargets | None = None  # one request alone could be held to; None: unknown
    steps: list[StepTiming] = []
    arrival_waits: list[tuple[str, float]] = []  # by the kind of step that was waited for, or "none"
    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    finetune_forward_tokens: int = 0
    finetune_backward_tokens: int = 0
    finetune_share: float = 0.0
    activation_policies: dict[str, dict[str, int]] = {}  # job -> policy ("A", "B", "C") -> layers in memory
    downgrades: int = 0  # times that requests made a microbatch keep less of its activations
    evictions: int = 0  # times that they took all of a microbatch's
    latency_model: str = ""  # the text of its file; "": not due
    swaps: dict[str, int] = {}  # adapter movements by kind: "load", "evict", "unload", "publish"
    adapters_found_in: dict[str, int] = {}  # requests by the tier that their adapter was in when they came
    adapter_seconds: float = 0.0  # that the engine's loop has spent on moving adapters


FromEngine = (
    StepOutputs
    | Reply
    | ModelResult
    | JobProgress
    | JobCheckpoint
    | JobMessage
    | JobStatus
    | EngineReady
    | EngineStats
)

_encoder = msgspec.msgpack.Encoder()
_to_engine = msgspec.msgpack.Decoder(ToEngine)
_from_engine = msgspec.msgpack.Decoder(FromEngine)


def encode(message: Message) -> bytes:
    """Message to wire bytes (msgpack)."""
    return _encoder.encode(message)


def decode_to_engine(data: bytes) -> ToEngine:
    """Wire bytes to a server -> engine message; raises msgspec.DecodeError on anything else."""
    return _to_engine.decode(data)


def decode_from_engine(data: bytes) -> FromEngine:
    """Wire bytes to an engine -> server message; raises msgspec.DecodeError on anything else."""
    return _from_engine.decode(data)
