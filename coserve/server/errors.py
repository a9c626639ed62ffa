"""The one place where the error tree becomes an HTTP envelope or a gRPC status."""

from __future__ import annotations

import logging
import math
from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from coserve import errors

_HTTP: tuple[tuple[type[errors.CoserveError], int, str], ...] = (
    (errors.Unauthenticated, 401, "invalid_request_error"),
    (errors.PermissionDenied, 403, "permission_error"),
    (errors.Gone, 410, "invalid_request_error"),
    (errors.NotFound, 404, "invalid_request_error"),
    (errors.MethodNotAllowed, 405, "invalid_request_error"),
    (errors.Conflict, 409, "invalid_request_error"),
    (errors.PayloadTooLarge, 413, "invalid_request_error"),
    (errors.UnsupportedMediaType, 415, "invalid_request_error"),
    (errors.InvalidRequest, 400, "invalid_request_error"),
    (errors.FailedPrecondition, 400, "invalid_request_error"),
    (errors.ReaderTooSlow, 408, "invalid_request_error"),
    (errors.RateLimited, 429, "rate_limit_error"),
    (errors.Unavailable, 503, "server_error"),
)

_GRPC: tuple[tuple[type[errors.CoserveError], grpc.StatusCode], ...] = (
    (errors.Unauthenticated, grpc.StatusCode.UNAUTHENTICATED),
    (errors.PermissionDenied, grpc.StatusCode.PERMISSION_DENIED),
    (errors.NotFound, grpc.StatusCode.NOT_FOUND),
    (errors.Conflict, grpc.StatusCode.ALREADY_EXISTS),
    (errors.PayloadTooLarge, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.InvalidRequest, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.FailedPrecondition, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.ReaderTooSlow, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.RateLimited, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.Unavailable, grpc.StatusCode.UNAVAILABLE),
)


def internal_error() -> errors.InternalError:
    """What a client is told of a fault whose details stay in the log."""
    return errors.InternalError("The server had an internal error; its log has the details.")


def told(error: Exception, log: logging.Logger, where: str) -> errors.CoserveError:
    """What a client is told of an error; of one outside the tree nothing but that, and `log` has the rest."""
    if isinstance(error, errors.CoserveError):
        return error
    log.error(where, exc_info=error)
    return internal_error()


def http_status(error: errors.CoserveError) -> tuple[int, str]:
    """HTTP status and OpenAI `type` of an error."""
    for kind, status, word in _HTTP:
        if isinstance(error, kind):
            return status, word
    return 500, "server_error"


def envelope(error: errors.CoserveError) -> dict[str, Any]:
    """OpenAI's error body: all four keys, always."""
    _, word = http_status(error)
    return {"error": {"message": error.message, "type": word, "param": error.param, "code": error.code}}


def http_headers(error: errors.CoserveError) -> dict[str, str]:
    """Retry advice that OpenAI's client understands."""
    if isinstance(error, errors.RateLimited | errors.Unavailable):
        return {"retry-after": str(max(1, math.ceil(error.retry_after)))}
    if isinstance(error, errors.Conflict | errors.InternalError):
        return {"x-should-retry": "false"}
    return {}


def grpc_code(error: errors.CoserveError) -> grpc.StatusCode:
    """gRPC status code of an error."""
    for kind, code in _GRPC:
        if isinstance(error, kind):
            return code
    return grpc.StatusCode.INTERNAL


def grpc_status(error: errors.CoserveError) -> status_pb2.Status:
    """google.rpc.Status with ErrorInfo (`reason` = code) and details: BadRequest for bad input, RetryInfo for
    what passes."""
    metadata = {"code": error.code, "param": error.param or ""}
    info = error_details_pb2.ErrorInfo(reason=error.code, domain="coserve", metadata=metadata)
    details: list[Any] = [info]
    if isinstance(error, errors.InvalidRequest | errors.PayloadTooLarge):
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=error.param or "", description=error.message, reason=error.code
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if isinstance(error, errors.RateLimited | errors.Unavailable):
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(max(1.0, error.retry_after) * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    packed = []
    for detail in details:
        box = any_pb2.Any()
        box.Pack(detail)
        packed.append(box)
    return status_pb2.Status(code=grpc_code(error).value[0], message=error.message, details=packed)
