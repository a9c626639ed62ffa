"""Routes of OpenAI's API that this server leaves out on purpose: each says so, where a 404 would look like a
wrong address."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from coserve.errors import InvalidRequest
from coserve.server.auth import USE
from coserve.server.context import Context
from coserve.server.http import Handler, Route

_EMBEDDINGS = (
    "Embeddings are not supported: the model was trained to answer, and its states measure no meaning; "
    "use a server with an embedding model."
)
_STORED = (
    "Chat completions are not kept, with store either; /v1/responses keeps its answers while the server runs."
)
_CHAT = "/v1/chat/completions"
LEFT_OUT: tuple[tuple[str, str, str], ...] = (
    ("POST", "/v1/embeddings", _EMBEDDINGS),
    ("GET", _CHAT, _STORED),
    ("GET", _CHAT + "/{id}", _STORED),
    ("POST", _CHAT + "/{id}", _STORED),
    ("DELETE", _CHAT + "/{id}", _STORED),
    ("GET", _CHAT + "/{id}/messages", _STORED),
)


def _refusal(sentence: str) -> Handler:
    async def refuse(request: Request) -> Response:
        raise InvalidRequest(sentence, code="unsupported")

    refuse.__doc__ = f"Refused: {sentence}"
    return refuse


def routes(context: Context) -> list[Route]:
    """A refusal for each."""
    return [Route(method, path, _refusal(sentence), USE) for method, path, sentence in LEFT_OUT]
