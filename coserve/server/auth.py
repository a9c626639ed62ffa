"""Keys and what they may do.

Roles: `use` (chat, completions, models, tokenizer), `tune` (also files, jobs and adapters), `admin`
(everything), `metrics` (only /metrics). Keys are kept as SHA-256 digests and compared in constant time.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

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
    """One accepted key: its digest and its role."""

    sha256: bytes
    role: str


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


class Authenticator:
    """Decides whether a credential may do something. Without keys everything is open."""

    def __init__(self, keys: Iterable[Key] = ()) -> None:
        self._keys = tuple(keys)

    @classmethod
    def from_config(
        cls, api_keys: Iterable[str], admin_api_keys: Iterable[str], keys_file: str
    ) -> Authenticator:
        """Keys of the flags and of `--keys-file`; ConfigError names what is wrong in the file."""
        keys = [Key(_digest(key), USE) for key in api_keys]
        keys += [Key(_digest(key), ADMIN) for key in admin_api_keys]
        if keys_file:
            keys += read_keys_file(Path(keys_file))
        return cls(keys)

    def role(self, authorization: str | None) -> str | None:
        """Role of an `Authorization: Bearer KEY` value; None when no key is needed.

        Raises Unauthenticated when there is none, or one that isn't known. All keys are compared, so the
        time taken says nothing about which one was near.
        """
        if not self._keys:
            return None
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise Unauthenticated("No API key: send it as 'Authorization: Bearer KEY'.")
        offered = _digest(token.strip())
        found: str | None = None
        for key in self._keys:
            if hmac.compare_digest(key.sha256, offered):
                found = key.role
        if found is None:
            raise Unauthenticated("The API key is not known to this server.")
        return found

    @staticmethod
    def require(role: str | None, right: str) -> None:
        """Raise PermissionDenied unless `role` (None: open server) includes `right`."""
        if role is not None and right not in _ALLOWED[role]:
            raise PermissionDenied(f"This API key has the role '{role}', which may not do this.")


def read_keys_file(path: Path) -> list[Key]:
    """Keys of a TOML or JSON file: a list `keys` of {key | sha256, role}; ConfigError when malformed."""
    try:
        text = path.read_text("utf-8")
        data = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"--keys-file: can't read {path}: {error.strerror}.", param="keys_file") from None
    except ValueError:
        raise ConfigError(
            f"--keys-file: {path} is neither valid TOML nor JSON (.json).", param="keys_file"
        ) from None
    entries = data.get("keys") if isinstance(data, dict) else None
    if not isinstance(entries, list):
        raise ConfigError(f"--keys-file: {path} needs a list 'keys'.", param="keys_file")
    return [_read_entry(entry, f"keys[{index}]") for index, entry in enumerate(entries)]


def _read_entry(entry: object, where: str) -> Key:
    if not isinstance(entry, dict):
        raise ConfigError(f"--keys-file: {where} must be a table with 'key' and 'role'.", param="keys_file")
    unknown = set(entry) - {"key", "sha256", "role", "name"}
    if unknown:
        raise ConfigError(f"--keys-file: {where} has an unknown field {min(unknown)}.", param="keys_file")
    role = entry.get("role", USE)
    if role not in ROLES:
        raise ConfigError(f"--keys-file: {where}.role must be one of {', '.join(ROLES)}.", param="keys_file")
    key, digest = entry.get("key"), entry.get("sha256")
    if isinstance(key, str) and key and digest is None:
        return Key(_digest(key), role)
    if isinstance(digest, str) and key is None:
        try:
            raw = bytes.fromhex(digest)
        except ValueError:
            raw = b""
        if len(raw) == 32:
            return Key(raw, role)
    raise ConfigError(
        f"--keys-file: {where} needs either 'key' (text) or 'sha256' (64 hex digits).", param="keys_file"
    )
