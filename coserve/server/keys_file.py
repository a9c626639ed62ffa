"""`--keys-file`: keys with their roles, shares and limits, and the latency classes that they may use."""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

from coserve.core.slo import LatencyTargets
from coserve.errors import ConfigError, InvalidRequest
from coserve.server.auth import ADMIN, ROLES, USE, Key, digest
from coserve.server.fields import PRIORITIES, Fields
from coserve.server.service_tiers import AUTO, DEFAULT, LatencyClass, ServiceTiers

_KEY_FIELDS = frozenset(
    ("key", "sha256", "role", "name", "classes", "weight")
    + ("max_concurrent_requests", "tokens_per_minute", "max_jobs", "min_priority")
)
_CLASS_FIELDS = frozenset(("name", "ttft_ms", "tpot_ms", "priority"))
_CLASS_NAME = re.compile(r"[\w.-]{1,64}")


@dataclass(frozen=True)
class KeysFile:
    """What the file says; `classes` are its own ones."""

    keys: tuple[Key, ...] = ()
    classes: tuple[LatencyClass, ...] = ()


def read_keys_file(path: str, default: LatencyTargets) -> KeysFile:
    """A TOML or JSON file: a list `keys`, and `classes` where there are some; no path is an empty file.

    Targets that a class leaves open are those of `default`. ConfigError names the entry and its field.
    """
    if not path:
        return KeysFile()
    data = _parsed(Path(path))
    try:
        classes = tuple(_class(entry, default) for entry in _entries(data, "classes"))
        known = ServiceTiers(default, classes).names
        if len({latency_class.name for latency_class in classes}) < len(classes):
            raise InvalidRequest("classes has a name twice.")
        return KeysFile(tuple(_key(entry, known) for entry in _entries(data, "keys")), classes)
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
    if not isinstance(data, dict) or not isinstance(data.get("keys"), list):
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


def _key(entry: Fields, known_classes: tuple[str, ...]) -> Key:
    entry.only(_KEY_FIELDS, "a key")
    role = entry.choice("role", ROLES) or USE
    classes = tuple(entry.strings("classes") or ())
    for name in classes:
        if name not in known_classes:
            raise entry.fail("classes", f"names {name!r}; there are {', '.join(known_classes)}.")
    weight = entry.number("weight", 1.0, 1e-3, 1e3) or 1.0
    limits = ("max_concurrent_requests", "tokens_per_minute", "max_jobs")
    numbers = [entry.integer(name, 0, 1) or 0 for name in limits]
    least = entry.integer("min_priority", None if role == ADMIN else 0, *PRIORITIES)
    return Key(_digest(entry), role, classes, weight, *numbers, min_priority=least)


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
