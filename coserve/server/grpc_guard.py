"""Keys, draining and errors for every RPC, in one interceptor."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import aclosing
from typing import Any, NoReturn

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from coserve.errors import CoserveError, InvalidRequest
from coserve.server.auth import TUNE, USE, Authenticator, Key
from coserve.server.context import Context
from coserve.server.errors import grpc_code, grpc_status, told
from coserve.server.grpc_stalls import Stalls
from coserve.server.http import request_id

logger = logging.getLogger(__name__)

_HEALTH = "/grpc.health.v1.Health/"
_RIGHTS = {
    "/coserve.v1.FineTuningService/": TUNE,
    "/coserve.v1.AdapterService/": TUNE,
    "/coserve.v1.InferenceService/": USE,
}


_Count = Callable[[grpc.aio.ServicerContext], None]


def _code_word(context: grpc.aio.ServicerContext) -> str:
    """How a call has ended, in the words of other servers' metrics ("NotFound"). One that the client left, or
    whose deadline passed, isn't done; one that ended well has no code."""
    if not context.done():
        return "Cancelled"
    code = context.code()
    return "OK" if not code else code.name.title().replace("_", "")


async def abort(context: grpc.aio.ServicerContext, error: Exception) -> NoReturn:
    """End the call with the error's status and its details."""
    failure = told(error, logger, "unexpected error")
    details = ("grpc-status-details-bin", grpc_status(failure).SerializeToString())
    trailing = (*(context.trailing_metadata() or ()), details)
    await context.abort(grpc_code(failure), failure.message, trailing_metadata=trailing)


def key_of(context: Context, metadata: Iterable[tuple[str, str | bytes]] | None) -> Key | None:
    """The key that a call's metadata carries; None where none is needed. Raises Unauthenticated."""
    authorization = dict(metadata or ()).get("authorization")
    return context.auth.key(authorization if isinstance(authorization, str) else None)


def _kind(handler: grpc.RpcMethodHandler) -> str:
    """What a method takes and gives, as grpc's own names have it: unary_stream and the like."""
    takes = "stream" if handler.request_streaming else "unary"
    return f"{takes}_{'stream' if handler.response_streaming else 'unary'}"


def _reading(
    behaviour: Callable[..., Any], read: Callable[[bytes], Any], is_stream: bool
) -> Callable[..., Any]:
    """A method that takes its messages as bytes; InvalidRequest for bytes that are no message of its kind."""

    def message(data: bytes) -> Any:
        try:
            return read(data)
        except DecodeError:
            raise InvalidRequest("This is no message of the kind that the method takes.") from None

    async def messages(stream: AsyncIterator[bytes]) -> AsyncIterator[Any]:
        async for data in stream:
            yield message(data)

    take = messages if is_stream else message
    return lambda request, context: behaviour(take(request), context)


def name_call(context: grpc.aio.ServicerContext, own: str = "") -> str:
    """The call's request id: what its metadata carries as `x-request-id`, else its `own`, else a new one. It
    goes back in the metadata at the call's end, whatever that is."""
    given = dict(context.invocation_metadata() or ()).get("x-request-id")
    name = request_id(given if isinstance(given, str) else own)
    context.set_trailing_metadata((("x-request-id", name),))
    return name


class Guard(grpc.aio.ServerInterceptor):
    """Health is open; every other method wants a key where keys are set, our services the right role."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._stalls = Stalls(context.config.http_timeout)

    def _check(self, details: grpc.HandlerCallDetails, ours: bool) -> None:
        key = key_of(self._context, details.invocation_metadata)
        right = next((right for prefix, right in _RIGHTS.items() if details.method.startswith(prefix)), USE)
        Authenticator.require(key, right)
        if ours:
            self._context.lifecycle.check_open()
            self._context.quotas.arrival(key)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """Wrap the method's handler; a refused call never reaches it, nor is its message read."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if method.startswith(_HEALTH):
            return handler
        ours = method.startswith("/coserve.v1.")
        try:
            self._check(handler_call_details, ours)
        except CoserveError as error:
            self._context.metrics.rejected(error.code)
            return self._refused(method, handler, error)
        return self._wrapped(method, handler) if handler is not None and ours else handler

    def _refused(
        self, method: str, handler: grpc.RpcMethodHandler | None, refusal: CoserveError
    ) -> grpc.RpcMethodHandler:
        """As a stream whatever the method is: a handler of one message would wait for it."""

        async def call(requests: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            if handler is not None:
                self._count(_kind(handler), method, context)
            name_call(context)
            await abort(context, refusal)
            yield

        return grpc.stream_stream_rpc_method_handler(call)

    def _wrapped(self, method: str, handler: grpc.RpcMethodHandler) -> grpc.RpcMethodHandler:
        kind = _kind(handler)
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        wrap = self._streaming if handler.response_streaming else self._unary
        # Read here: a message that can't be would end the call as UNKNOWN, with a traceback in the log.
        behaviour = _reading(getattr(handler, kind), handler.request_deserializer, handler.request_streaming)
        return make(
            wrap(behaviour, lambda context: self._count(kind, method, context)),
            response_serializer=handler.response_serializer,
        )

    def _failed(self, error: Exception) -> Exception:
        if isinstance(error, CoserveError):
            self._context.metrics.rejected(error.code)
        return error

    def _count(self, kind: str, method: str, context: grpc.aio.ServicerContext) -> None:
        """Name a call that begins and count it, and its code once it has ended."""
        name_call(context)
        ended = self._context.metrics.rpc.grpc(kind, method)
        context.add_done_callback(lambda done: ended(_code_word(done)))

    def _unary(self, behaviour: Callable[..., Awaitable[Any]], count: _Count) -> Any:
        async def call(request: Any, context: grpc.aio.ServicerContext) -> Any:
            count(context)
            try:
                return await behaviour(request, context)
            except Exception as error:
                failure = self._failed(error)
            await abort(context, failure)

        return call

    def _streaming(self, behaviour: Callable[..., AsyncIterator[Any]], count: _Count) -> Any:
        async def call(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            count(context)
            task, stalls = asyncio.current_task(), self._stalls
            assert task is not None
            failure: Exception | None = None
            try:
                async with aclosing(behaviour(request, context)) as answers:  # type: ignore[type-var]
                    async for answer in answers:
                        stalls.begin(task)
                        yield answer
                        stalls.end(task)
            except Exception as error:
                failure = self._failed(error)
            finally:
                stalls.end(task)
            if failure is not None:
                await abort(context, failure)

        return call
