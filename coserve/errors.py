"""The one error tree.

    CoserveError
    ├── ConfigError             wrong flags, files or settings at start-up (exit code 2)
    ├── InvalidRequest          what was asked can never be done
    │   ├── ContextLengthExceeded
    │   └── DatasetError        every bad line of a data file, up to a limit
    ├── FailedPrecondition      the thing's state must change first
    │   └── AdapterNotLive      no optimizer step yet, or no job any more
    ├── Unauthenticated / PermissionDenied
    ├── NotFound
    │   ├── ModelNotFound
    │   └── Gone                it was there, and has ended or expired
    ├── Conflict                the name exists, or the thing is busy
    ├── PayloadTooLarge / UnsupportedMediaType / MethodNotAllowed
    ├── RateLimited             a key's limit; try again after `retry_after` seconds
    │   └── TargetOutOfReach    the first token would come after its latency target
    ├── Unavailable             starting, draining, or the engine is being restarted
    │   └── QueueFull           as many requests wait as may
    ├── ReaderTooSlow           an answer isn't read as fast as it is made
    └── InternalError           a fault of ours

`server/errors.py` maps the tree once to HTTP and once to gRPC. Messages name the field, line or flag and
the fix, and never a key, a prompt or a path that the client did not send.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class CoserveError(Exception):
    """Base of all errors with a message meant for the user.

    `code` is a stable machine-readable word, `param` the dotted name of the offending field.
    """

    default_code = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or self.default_code

    @property
    def kind(self) -> str:
        """The word of its class, whatever its own code: how another process knows which class it is."""
        return self.default_code


class ConfigError(CoserveError):
    """Wrong command line, configuration or model directory; the program exits with 2."""

    default_code = "invalid_configuration"


class InvalidRequest(CoserveError):
    """The request can't be honoured whatever the server's state."""

    default_code = "invalid_value"


class ContextLengthExceeded(InvalidRequest):
    """Prompt plus output would not fit into the model's context."""

    default_code = "context_length_exceeded"


@dataclass(frozen=True)
class LineError:
    """One bad line of a data file: 1-based `line`, dotted `field` within the row, and the `reason`."""

    line: int
    field: str
    reason: str

    def __str__(self) -> str:
        where = f", field {self.field}" if self.field else ""
        return f"line {self.line}{where}: {self.reason}"


class DatasetError(InvalidRequest):
    """All bad lines of a data file; `total` counts those beyond the listed ones too."""

    default_code = "invalid_training_file"

    def __init__(self, lines: Sequence[LineError], total: int, *, param: str = "training_file") -> None:
        listed = "; ".join(str(line) for line in lines)
        more = f" (and {total - len(lines)} more)" if total > len(lines) else ""
        noun = "line" if total == 1 else "lines"
        names = {"training_file": "", "validation_file": " in the validation file"}
        where = names.get(param, f" in {param}" if param.startswith("publish_if") else "")
        super().__init__(f"{total} bad {noun}{where}: {listed}{more}", param=param)
        self.lines = tuple(lines)
        self.total = total


class FailedPrecondition(CoserveError):
    """The thing exists but its state forbids the call (a job that has ended, an adapter in use)."""

    default_code = "failed_precondition"


class AdapterNotLive(FailedPrecondition):
    """The job's adapter can't answer while it trains: it has no step yet, or the job is over."""

    default_code = "adapter_not_live"


class Unauthenticated(CoserveError):
    """No key, or a key that isn't known."""

    default_code = "invalid_api_key"


class PermissionDenied(CoserveError):
    """The key is known and may not do this."""

    default_code = "permission_denied"


class NotFound(CoserveError):
    """No such file, job, adapter, checkpoint or route."""

    default_code = "not_found"


class ModelNotFound(NotFound):
    """`model` names neither the base nor a published adapter."""

    default_code = "model_not_found"


class Gone(NotFound):
    """It was there and has ended or expired: a session, the result of a call."""

    default_code = "gone"


class Conflict(CoserveError):
    """The name is taken, or another call changes the same thing."""

    default_code = "conflict"


class PayloadTooLarge(CoserveError):
    """Body or upload over its limit."""

    default_code = "payload_too_large"


class UnsupportedMediaType(CoserveError):
    """A content type that the route doesn't take."""

    default_code = "unsupported_media_type"


class MethodNotAllowed(CoserveError):
    """The path exists, the method doesn't."""

    default_code = "method_not_allowed"


class RateLimited(CoserveError):
    """Over a limit; `retry_after` is in seconds."""

    default_code = "rate_limit_exceeded"

    def __init__(
        self, message: str, *, retry_after: float, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message, param=param, code=code)
        self.retry_after = retry_after


class TargetOutOfReach(RateLimited):
    """The requests ahead leave this one's first token no time within its class's target."""

    default_code = "ttft_target_out_of_reach"


class Unavailable(CoserveError):
    """The server can't take this now (starting, draining, engine restarting); may be retried."""

    default_code = "service_unavailable"

    def __init__(
        self, message: str, *, retry_after: float = 1.0, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message, param=param, code=code)
        self.retry_after = retry_after


class QueueFull(Unavailable):
    """As many requests wait as `--max-num-queued-reqs` allows."""

    default_code = "queue_full"


class ReaderTooSlow(CoserveError):
    """The client takes its answer more slowly than it is made, by more than is kept for it."""

    default_code = "reader_too_slow"


class InternalError(CoserveError):
    """A fault of the server."""

    default_code = "internal_error"
