"""`--keys-file`: keys with their roles, what they see, shares and limits, and the latency classes that they
may use."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from coserve.core.slo import LatencyTargets
from coserve.errors import ConfigError, InvalidRequest
from coserve.server.auth import ADMIN, ROLES, USE, Key, digest
from coserve.server.fields import PRIORITIES, Fields
from coserve.server.service_tiers import AUTO, DEFAULT, LatencyClass, ServiceTiers

_RATES = ("requests_per_minute", "tokens_per_minute", "max_concurrent_requests")
LIMITS = (*_RATES, "max_jobs", "max_upload_bytes")
_KEY_FIELDS = frozenset(
    ("key", "sha256", "role", "name", "tenant", "models", "classes", "weight", "min_priority", *LIMITS)
)
_FILE_FIELDS = frozenset(("keys", "classes", "defaults"))
_CLASS_FIELDS = frozenset(("name", "ttft_ms", "tpot_ms", "priority"))
_CLASS_NAME = re.compile(r"[\w.-]{1,64}")
_MODELS = re.compile(r"[\w.:/*?-]{1,200}", re.ASCII)


@dataclass(frozen=True)
class KeysFile:
    """What the file says; `classes` are its own ones, `defaults` the limits (`LIMITS`) of keys without any of
    their own, those of the flags too. `has_plain_keys` says whether a key stands in it as it is."""

    keys: tuple[Key, ...] = ()
    classes: tuple[LatencyClass, ...] = ()
    defaults: Mapping[str, int] = field(default_factory=dict)
    has_plain_keys: bool = False


def read_keys_file(path: str, default: LatencyTargets) -> KeysFile:
    """A TOML or JSON file: `keys`, `classes` and `defaults`, each where wanted; no path is an empty file.

    Targets that a class leaves open are those of `default`. ConfigError names the entry and its field.
    """
    if not path:
        return KeysFile()
    data = _parsed(Path(path))
    try:
        data.only(_FILE_FIELDS, "the file")
        classes = tuple(_class(entry, default) for entry in _entries(data, "classes"))
        known = ServiceTiers(default, classes).names
        if len({latency_class.name for latency_class in classes}) < len(classes):
            raise InvalidRequest("classes has a name twice.")
        given = data.object("defaults") or Fields({}, "defaults.")
        given.only(frozenset(LIMITS), "the limits")
        defaults = _limits(given)
        keys = tuple(_key(entry, known, defaults) for entry in _entries(data, "keys"))
        for place, key in enumerate(keys):
            if key.sha256 in [other.sha256 for other in keys[:place]]:
                raise InvalidRequest(f"keys[{place}] is there twice.")
        plain = any(entry.has("key") for entry in _entries(data, "keys"))
        return KeysFile(keys, classes, defaults, plain)
    except InvalidRequest as error:
        raise ConfigError(f"--keys-file: {error.message}", param="keys_file") from None


def _parsed(path: Path) -> Fields:
    try:
        text = path.read_text("utf-8")
        data = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"--keys-file: can't read {path}: {error.strerror}.", param="keys_file") from None
    except ValueError:
        raise ConfigError(
            f"--keys-file: {path} is neither valid TOML nor JSON (.json).", param="keys_file"
        ) from None
    if not isinstance(data, dict) or not data:
        raise ConfigError(f"--keys-file: {path} needs a list 'keys'.", param="keys_file")
    return Fields(data)


def _entries(data: Fields, name: str) -> list[Fields]:
    return [Fields(entry, f"{name}[{index}].") for index, entry in enumerate(data.array(name) or [])]


def _class(entry: Fields, default: LatencyTargets) -> LatencyClass:
    entry.only(_CLASS_FIELDS, "a latency class")
    name = entry.required_string("name")
    if not _CLASS_NAME.fullmatch(name):
        raise entry.fail("name", "must be 1 to 64 letters, digits, '.', '_' or '-'.")
    if name in (AUTO, DEFAULT):
        raise entry.fail("name", f"can't be {name}: --slo-ttft-ms and --slo-tpot-ms set the default class.")
    ttft = entry.number("ttft_ms", default.ttft * 1e3, 0.0)
    tpot = entry.number("tpot_ms", default.tpot * 1e3, 0.0)
    targets = LatencyTargets(ttft=(ttft or 0.0) / 1e3, tpot=(tpot or 0.0) / 1e3)
    return LatencyClass(name, targets, entry.integer("priority", 0, -(2**15), 2**15) or 0)


def _key(entry: Fields, known_classes: tuple[str, ...], defaults: Mapping[str, int]) -> Key:
    entry.only(_KEY_FIELDS, "a key")
    role = entry.choice("role", ROLES) or USE
    classes, models = tuple(entry.strings("classes") or ()), tuple(entry.strings("models") or ())
    for name in classes:
        if name not in known_classes:
            raise entry.fail("classes", f"names {name!r}; there are {', '.join(known_classes)}.")
    for index, pattern in enumerate(models):
        if not _MODELS.fullmatch(pattern):
            raise entry.fail(f"models[{index}]", "must be a model's name, with * and ? for any characters.")
    if entry.has("models") and not models:
        raise entry.fail("models", "must name a model; leave it out for all.")
    if models and role == ADMIN:
        raise entry.fail("models", "is not for the role 'admin', which sees all.")
    owner = entry.string("tenant") or ""
    if owner and not _CLASS_NAME.fullmatch(owner):
        raise entry.fail("tenant", "must be 1 to 64 letters, digits, '.', '_' or '-'.")
    return Key(
        _digest(entry),
        role,
        classes,
        weight=entry.number("weight", 1.0, 1e-3, 1e3) or 1.0,
        min_priority=entry.integer("min_priority", None if role == ADMIN else 0, *PRIORITIES),
        models=models,
        owner=owner,
        **({} if role == ADMIN else defaults) | _limits(entry),
    )


def _limits(entry: Fields) -> dict[str, int]:
    """The limits that are given."""
    found = {name: entry.integer(name, None, 1) for name in LIMITS}
    return {name: number for name, number in found.items() if number is not None}


def _digest(entry: Fields) -> bytes:
    key, given = entry.raw("key"), entry.raw("sha256")
    if isinstance(key, str) and key and given is None:
        return digest(key)
    if isinstance(given, str) and key is None:
        try:
            raw = bytes.fromhex(given)
        except ValueError:
            raw = b""
        if len(raw) == 32:
            return raw
    where = entry.path.rstrip(".")
    raise InvalidRequest(f"{where} needs either 'key' (text) or 'sha256' (64 hex digits).")
