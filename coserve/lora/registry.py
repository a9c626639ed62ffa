"""The names under which adapters are known: name -> versions, and which one the bare name means.

Held in memory by the server and fed from its database. A version is immutable; publishing swaps one pointer,
so whoever resolved a name before keeps the version it got. Readers take no lock: they see a name as it was
before a change or after it. A change costs the same however many names there are, and a registered version
about a kilobyte.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Collection
from dataclasses import dataclass, replace
from operator import itemgetter

from coserve.errors import Conflict, FailedPrecondition, InvalidRequest, ModelNotFound, NotFound

_NAME = re.compile(r"[A-Za-z0-9_:-][A-Za-z0-9._:-]{0,127}")


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    """One immutable version. `path` is its PEFT directory, `digest` names its content (peft_files.py).

    `job_id` is the job that trained it, "" for a loaded one. `status` is "loading", "ready" or "failed".
    `pinned` asks to keep it on the device.
    """

    name: str
    version: int
    digest: str
    path: str
    rank: int
    created_at: int
    job_id: str = ""
    status: str = "ready"
    pinned: bool = False

    @property
    def full_name(self) -> str:
        """`name@version`."""
        return f"{self.name}@{self.version}"


@dataclass(frozen=True, slots=True)
class _Entry:
    """What a name means; `versions` only grows, one that shrinks is another."""

    versions: dict[int, AdapterVersion]
    current: int
    highest: int  # version numbers are never given twice


def check_adapter_name(name: str, reserved: Collection[str] = (), *, param: str = "lora_name") -> None:
    """Names are 1 to 128 of A-Z a-z 0-9 . _ : - and don't begin with a dot.

    "/" is out because a name is also a directory's, "@" because it separates the version. `reserved` are the
    base model's names. Raises InvalidRequest.
    """
    if not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"adapter name {name[:140]!r} must be 1 to 128 of the characters A-Z a-z 0-9 . _ : - and not "
            "begin with a dot",
            param=param,
        )
    if name in reserved:
        raise InvalidRequest(f"{name!r} is the name of the base model; choose another one", param=param)


class AdapterRegistry:
    """All adapters by name. `base_names` are refused as adapter names."""

    def __init__(self, base_names: Collection[str]) -> None:
        self.base_names = frozenset(base_names)
        self._entries: dict[str, _Entry] = {}
        self._by_digest: dict[str, tuple[AdapterVersion, ...]] = {}
        self._count = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """How many versions there are, of all names together."""
        return self._count

    def of_digest(self, digest: str) -> tuple[AdapterVersion, ...]:
        """The versions with these weights."""
        return self._by_digest.get(digest, ())

    def resolve(self, model: str) -> AdapterVersion:
        """The version that "name" or "name@3" means now.

        Raises ModelNotFound when there is none, FailedPrecondition when it is still loading or has failed.
        """
        name, at, number = model.partition("@")
        entry = self._entries.get(name)
        wanted = None
        if entry is not None and not at:
            wanted = entry.versions[entry.current]
        elif entry is not None and number.isascii() and number.isdigit():
            wanted = entry.versions.get(int(number))
        if wanted is None:
            raise ModelNotFound(f"the model {model[:200]!r} does not exist", param="model")
        if wanted.status != "ready":
            raise FailedPrecondition(f"adapter {wanted.full_name} is {wanted.status}", param="model")
        return wanted

    def get(self, name: str, version: int = 0) -> AdapterVersion:
        """A version whatever its status; 0 is the current one. Raises NotFound."""
        entry = self._entries.get(name)
        found = entry.versions.get(version or entry.current) if entry else None
        if found is None:
            what = f"{name[:200]}@{version}" if version else name[:200]
            raise NotFound(f"no adapter {what!r}", param="name")
        return found

    def versions(self, name: str) -> list[AdapterVersion]:
        """All versions of a name, oldest first. Raises NotFound."""
        self.get(name)
        return [version for _, version in sorted(self._entries[name].versions.items())]

    def current(self) -> list[AdapterVersion]:
        """The current version of every name, in order of name."""
        entries = sorted(self._entries.items(), key=itemgetter(0))
        return [entry.versions[entry.current] for _, entry in entries]

    def all_versions(self) -> list[AdapterVersion]:
        """Every version of every name."""
        entries = list(self._entries.values())
        return [version for entry in entries for version in list(entry.versions.values())]

    def next_version(self, name: str) -> int:
        """The number the next version of `name` gets: one more than the largest it has had."""
        entry = self._entries.get(name)
        return entry.highest + 1 if entry else 1

    def publish(self, version: AdapterVersion, *, make_current: bool = True) -> None:
        """Add a version and point its name at it, in one swap.

        Raises InvalidRequest for the name, Conflict when this version number is taken.
        """
        check_adapter_name(version.name, self.base_names)
        with self._lock:
            entry = self._entries.get(version.name)
            if entry is not None and version.version in entry.versions:
                raise Conflict(f"adapter {version.full_name} exists already", param="name")
            versions = entry.versions if entry else {}
            versions[version.version] = version
            self._by_digest[version.digest] = (*self.of_digest(version.digest), version)
            self._count += 1
            current = version.version if make_current or entry is None else entry.current
            highest = max(version.version, entry.highest if entry else 0)
            self._entries[version.name] = _Entry(versions, current, highest)

    def update(self, version: AdapterVersion) -> None:
        """Put a version with other settings in the place of itself. Raises NotFound."""
        with self._lock:
            old = self.get(version.name, version.version)
            self._entries[version.name].versions[version.version] = version
            others = (kept for kept in self.of_digest(old.digest) if kept is not old)
            self._by_digest[old.digest] = (*others, version)

    def rollback(self, name: str, version: int) -> AdapterVersion:
        """Point `name` at an earlier version again; later versions keep their numbers. Raises NotFound."""
        with self._lock:
            wanted = self.get(name, version)
            self._entries[name] = replace(self._entries[name], current=wanted.version)
            return wanted

    def remove(self, name: str, version: int = 0) -> list[AdapterVersion]:
        """Forget a version, or with 0 the whole name; returns what was removed. Raises NotFound.

        When the current version goes, the newest of the others takes its place.
        """
        with self._lock:
            found = self.get(name, version)
            entry = self._entries[name]
            gone = [found] if version else list(entry.versions.values())
            numbers = {removed.version for removed in gone}
            left = {number: kept for number, kept in entry.versions.items() if number not in numbers}
            if left:
                current = entry.current if entry.current in left else max(left)
                self._entries[name] = _Entry(left, current, entry.highest)
            else:
                del self._entries[name]
            self._count -= len(gone)
            for removed in gone:
                self._forget(removed)
            return gone

    def _forget(self, version: AdapterVersion) -> None:
        left = tuple(kept for kept in self.of_digest(version.digest) if kept is not version)
        if left:
            self._by_digest[version.digest] = left
        else:
            self._by_digest.pop(version.digest, None)
