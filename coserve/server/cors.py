"""Which web pages may call the server from a browser: none, unless `--allowed-origins` names them.

Credentials mode (cookies) is never allowed: keys travel in a header of their own, which a page sets itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from starlette.responses import Response

from coserve.errors import ConfigError, PermissionDenied
from coserve.server.http import error_response

ANY = "*"
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s,*]+")
_METHODS = "GET, POST, PUT, DELETE, OPTIONS"
_EXPOSED = (
    "x-request-id, retry-after, www-authenticate, content-disposition, x-ratelimit-limit-requests, "
    "x-ratelimit-remaining-requests, x-ratelimit-reset-requests, x-ratelimit-limit-tokens, "
    "x-ratelimit-remaining-tokens, x-ratelimit-reset-tokens"
)
_HEADER_NAMES = re.compile(rb"[A-Za-z0-9!#$%&'*+.^_`|~-]+( *, *[A-Za-z0-9!#$%&'*+.^_`|~-]+)*")
_MAX_AGE = "600"  # seconds that a browser may remember a preflight


class Cors:
    """The origins that are allowed. Raises ConfigError for one that isn't `*` or SCHEME://HOST[:PORT]."""

    def __init__(self, origins: Iterable[str]) -> None:
        self._origins = frozenset(origins)
        for origin in self._origins:
            if origin != ANY and not _ORIGIN.fullmatch(origin):
                raise ConfigError(
                    f"--allowed-origins: {origin!r} must be * or SCHEME://HOST[:PORT].",
                    param="allowed_origins",
                )

    def preflight(self, method: str, headers: Mapping[bytes, bytes]) -> Response | None:
        """The answer to a browser's question, which carries no key; None for any other request. `headers` of
        the same request go with it."""
        if not self._origins or method != "OPTIONS" or b"access-control-request-method" not in headers:
            return None
        if "access-control-allow-origin" not in self.headers(headers):
            return error_response(PermissionDenied("This origin is not allowed.", code="origin_not_allowed"))
        answer = {"access-control-allow-methods": _METHODS, "access-control-max-age": _MAX_AGE}
        wanted = headers.get(b"access-control-request-headers", b"")
        if _HEADER_NAMES.fullmatch(wanted):
            answer["access-control-allow-headers"] = wanted.decode("ascii")
            answer["vary"] = "Access-Control-Request-Headers"
        return Response(status_code=204, headers=answer)

    def check_page(self, method: str, headers: Mapping[bytes, bytes]) -> None:
        """On a server that wants no key: refuse what a page of another origin would change.

        A browser sends some such requests (an upload, a POST without a body) unasked, with the rights of
        whoever visits the page. Raises PermissionDenied.
        """
        origin = headers.get(b"origin", b"").decode("latin-1")
        if not origin or method in ("GET", "HEAD", "OPTIONS") or self._origins & {ANY, origin}:
            return
        if origin.partition("://")[2].encode("latin-1") != headers.get(b"host", b""):
            raise PermissionDenied(
                "A web page of another origin may not use this server; --allowed-origins would allow it.",
                code="origin_not_allowed",
            )

    def headers(self, headers: Mapping[bytes, bytes]) -> dict[str, str]:
        """What every answer carries so that an allowed page may read it; empty while none is allowed."""
        if not self._origins:
            return {}
        if ANY in self._origins:
            return {"access-control-allow-origin": ANY, "access-control-expose-headers": _EXPOSED}
        origin = headers.get(b"origin", b"").decode("latin-1")
        if origin not in self._origins:
            return {"vary": "Origin"}
        return {
            "access-control-allow-origin": origin,
            "access-control-expose-headers": _EXPOSED,
            "vary": "Origin",
        }
