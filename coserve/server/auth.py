"""Keys, what they may do, and what they see.

Roles: `use` (chat, completions, models, tokenizer), `tune` (also files, jobs and adapters), `admin`
(everything), `metrics` (only /metrics). Keys are kept as SHA-256 digests and compared in constant time.
A key sees the models that its `models` allow, and the files and jobs of its own tenant; what it doesn't see
is not there for it. `None` in place of a key is the server itself, or anybody on a server without keys.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from coserve.errors import ConfigError, PermissionDenied, Unauthenticated

USE = "use"
TUNE = "tune"
METRICS = "metrics"
ADMIN = "admin"
ROLES = (USE, TUNE, ADMIN, METRICS)

_ALLOWED: dict[str, frozenset[str]] = {
    USE: frozenset({USE, METRICS}),
    TUNE: frozenset({USE, TUNE, METRICS}),
    METRICS: frozenset({METRICS}),
    ADMIN: frozenset(ROLES),
}


@dataclass(frozen=True)
class Key:
    """One accepted key: its digest, its role, what it sees, and how the requests that carry it are served.

    `models` are the names that it may use, with `*` and `?` for any characters; empty: all. `owner` is the
    tenant that it shares files, jobs and limits with; empty: the key is a tenant of its own. `classes` are
    the latency classes that it may use, the first being its own; empty: all of them, its own being
    "default". `weight` is its share beside other keys. `min_priority` is the least number (the first turn)
    that its requests and jobs may ask for; None: any. The limits are per key (jobs per tenant), 0 being none;
    `max_upload_bytes` bounds each file, adapter and upload by itself.
    """

    sha256: bytes
    role: str
    classes: tuple[str, ...] = ()
    weight: float = 1.0
    max_concurrent_requests: int = 0
    tokens_per_minute: int = 0
    max_jobs: int = 0
    min_priority: int | None = None
    models: tuple[str, ...] = ()
    owner: str = ""
    requests_per_minute: int = 0
    max_upload_bytes: int = 0

    @property
    def tenant(self) -> str:
        """A name for who holds this key, which says nothing about the key."""
        return self.owner or self.sha256.hex()[:16]


def sees(key: Key | None, *names: str) -> bool:
    """Whether `key` may know of a model by one of its `names`; an adapter's version goes by the bare name."""
    if key is None or not key.models or key.role == ADMIN:
        return True
    return any(fnmatchcase(name, pattern) for name in names for pattern in key.models)


def owns(key: Key | None, tenant: str) -> bool:
    """Whether `key` may know of a file or a job of `tenant`."""
    return key is None or key.role == ADMIN or key.tenant == tenant


def tenant_of(key: Key | None) -> str:
    """Whose a file or a job is that `key` makes; empty on a server without keys."""
    return "" if key is None else key.tenant


def digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


class Authenticator:
    """Decides whether a credential may do something. Without keys everything is open."""

    def __init__(self, keys: Iterable[Key] = ()) -> None:
        self._keys = tuple(keys)

    @classmethod
    def from_config(
        cls,
        api_keys: Iterable[str],
        admin_api_keys: Iterable[str],
        keys: Iterable[Key] = (),
        defaults: Mapping[str, int] | None = None,
    ) -> Authenticator:
        """Keys of the flags, those of `--api-key` with the limits `defaults`, and `keys` of `--keys-file`."""
        chat = [Key(digest(key), USE, **defaults or {}) for key in api_keys]
        return cls([*chat, *(Key(digest(key), ADMIN) for key in admin_api_keys), *keys])

    @property
    def is_open(self) -> bool:
        """Whether nobody needs a key."""
        return not self._keys

    def key(self, authorization: str | None) -> Key | None:
        """The key of an `Authorization: Bearer KEY` value; None when none is needed.

        Raises Unauthenticated when there is none, or one that isn't known. All keys are compared, so the
        time taken says nothing about which one was near.
        """
        if not self._keys:
            return None
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise Unauthenticated("No API key: send it as 'Authorization: Bearer KEY'.")
        offered = digest(token.strip())
        found: Key | None = None
        for key in self._keys:
            if hmac.compare_digest(key.sha256, offered):
                found = key
        if found is None:
            raise Unauthenticated("The API key is not known to this server.")
        return found

    def take(self, other: Authenticator) -> None:
        """Accept the keys of `other` from now on, in place of the present ones.

        Raises ConfigError rather than open a server to everybody that wanted keys.
        """
        if self._keys and not other._keys:
            raise ConfigError("--keys-file: no key is left in it; without any the server would be open.")
        self._keys = other._keys

    def weight(self, tenant: str) -> float:
        """The share of who holds a key, 1 for one that isn't known any more."""
        return next((key.weight for key in self._keys if key.tenant == tenant), 1.0)

    @staticmethod
    def check_priority(key: Key | None, priority: int) -> None:
        """Raise PermissionDenied for a `priority` that goes before what `key` (None: open server) allows."""
        least = key.min_priority if key is not None else None
        if least is not None and priority < least:
            raise PermissionDenied(
                f"priority is {priority}; this API key may not go below {least} (a lower number goes first).",
                param="priority",
            )

    @staticmethod
    def require(key: Key | None, right: str) -> None:
        """Raise PermissionDenied unless the role of `key` (None: open server) includes `right`."""
        if key is not None and right not in _ALLOWED[key.role]:
            raise PermissionDenied(f"This API key has the role '{key.role}', which may not do this.")
