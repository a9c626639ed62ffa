"""Which weights a `model` means: the base, an adapter's version, a checkpoint, or a job in training."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from coserve.adapter_metrics import LoadedAdapter
from coserve.engine.messages import AdapterRef
from coserve.errors import FailedPrecondition, InvalidRequest, ModelNotFound, NotFound, PermissionDenied
from coserve.lora.registry import AdapterRegistry, AdapterVersion, check_adapter_name
from coserve.metrics import Metrics
from coserve.server.adapter_store import AdapterRow
from coserve.server.alias_store import Alias
from coserve.server.application.models import BaseModel, Target, unknown_model
from coserve.server.auth import Key, owns, sees

LIVE = ":live"  # after a job's id: its adapter while it trains


@dataclass(frozen=True)
class NamedCheckpoint:
    """A checkpoint that answers: its weights, and the name that its job publishes under. One of a `tenant`
    answers nobody else, whatever its name."""

    reference: AdapterRef
    adapter: str
    tenant: str | None = None

    def seen_by(self, key: Key | None, name: str) -> bool:
        """Whether `key` may know of it by this name."""
        return sees(key, name, self.adapter) if self.tenant is None else owns(key, self.tenant)


class AdapterNames:
    """The versions in service, the checkpoints that answer, and the tier each one's weights are in.

    Who asks is a `key`: names that it doesn't see are unknown, to every method that takes one.
    """

    def __init__(self, base: BaseModel, metrics: Metrics, serves_live: bool) -> None:
        self._base = base
        self._metrics = metrics
        self._serves_live = serves_live
        self._registry = AdapterRegistry(base.names)
        self._rows: dict[tuple[str, int], AdapterRow] = {}
        self._checkpoints: dict[str, NamedCheckpoint] = {}
        self._tiers: dict[str, str] = {}
        self.aliases: dict[str, Alias] = {}  # replaced whole by `Aliases`, never changed in place

    def resolve(self, model: str | None, key: Key | None) -> Target:
        """What a request's `model` runs on; ModelNotFound for a name nobody knows, never the base instead.

        A job's live weights are looked up when the request runs (`Generator`): their job is on disk.
        """
        alias = self.aliases.get(model or "")
        if alias is None:
            return self._resolve(model, key)
        if not self.sees_alias(alias, key):
            raise self._unknown(alias.name, key)
        return replace(self._resolve(alias.model, key), name=alias.name)

    def sees_alias(self, alias: Alias, key: Key | None) -> bool:
        """Whether `key` may know of an alias: of its name, and of the model that it means."""
        return sees(key, alias.name) and self.sees_model(alias.model, key)

    def sees_model(self, name: str, key: Key | None) -> bool:
        """Whether `key` may know of the base, by its first name, or of an adapter, by its bare one."""
        return sees(key, self._base.name if self.is_base(name) else name.partition("@")[0])

    def _resolve(self, model: str | None, key: Key | None) -> Target:
        if model is None or self.is_base(model):
            if not sees(key, self._base.name):
                raise self._unknown(model or self._base.name, key)
            return Target(self._base.name, None, fingerprint=self._base.fingerprint)
        if model in self._checkpoints:
            checkpoint = self._checkpoints[model]
            if not checkpoint.seen_by(key, model):
                raise self._unknown(model, key)
            return self._target(model, checkpoint.reference)
        if model.startswith("ftjob-") and model.endswith(LIVE):
            if not self._serves_live:
                raise FailedPrecondition(
                    "This server answers with no adapter in training; start it with --enable-live-adapters.",
                    param="model",
                    code="live_adapters_disabled",
                )
            return Target(model, None, model.removesuffix(LIVE))
        try:
            if sees(key, model.partition("@")[0]):
                return self._target(model, ref(self._registry.resolve(model)))
        except ModelNotFound:
            pass  # as one that this key doesn't see
        raise self._unknown(model, key)

    def _unknown(self, model: str, key: Key | None) -> ModelNotFound:
        """The same for what `key` doesn't see and for what isn't there."""
        return unknown_model(model, self._base.names if sees(key, self._base.name) else ())

    def _target(self, model: str, adapter: AdapterRef) -> Target:
        """An adapter's version; the fingerprint is the base's and twelve digits of the adapter's digest."""
        return Target(model, adapter, fingerprint=f"{self._base.fingerprint}_{adapter.digest[:12]}")

    def newest(self, key: Key | None) -> list[AdapterRow]:
        """The current version of every name, with its origin."""
        return self._rows_of(self._registry.current(), key)

    def _rows_of(self, versions: Sequence[AdapterVersion], key: Key | None) -> list[AdapterRow]:
        return [self._rows[found.name, found.version] for found in versions if sees(key, found.name)]

    def get(self, name: str, version: int = 0, *, key: Key | None) -> AdapterRow:
        """A version by name (or "name@3") and number, 0 for the current one; ModelNotFound."""
        plain, at, number = name.partition("@")
        if at:
            if not number.isascii() or not number.isdigit() or version:
                raise unknown_model(name)
            version = int(number)
        if not sees(key, plain):
            raise unknown_model(name if not version or at else f"{name}@{version}")
        try:
            found = self._registry.get(plain, version)
        except NotFound:
            raise unknown_model(name if not version or at else f"{name}@{version}") from None
        return self._rows[found.name, found.version]

    def all_versions(self, key: Key | None) -> list[AdapterRow]:
        """Every version in service."""
        return self._rows_of(self._registry.all_versions(), key)

    def tier(self, digest: str) -> str:
        """Where a version's weights are: "device", "host" or "disk"."""
        return self._tiers.get(digest, "disk")

    def take_tiers(self, tiers: dict[str, str]) -> None:
        """The engine's latest word on where weights are."""
        self._tiers = tiers
        self._count()

    def _count(self) -> None:
        loaded = [
            LoadedAdapter(version.name, tier, version.pinned)
            for digest, tier in self._tiers.items()
            for version in self._registry.of_digest(digest)
        ]
        self._metrics.adapters(len(self._registry), loaded)

    def check_name(self, name: str, param: str, key: Key | None) -> None:
        """Raise InvalidRequest for a name that can't be an adapter's, PermissionDenied for one that `key` may
        not give: whether it is taken stays unsaid."""
        check_adapter_name(name, self._base.names, param=param)
        self.check_named(name, param, key)
        if name in self.aliases:
            raise InvalidRequest(f"{name!r} is an alias; choose another name, or delete it.", param=param)
        if name.startswith(("ftjob-", "ftckpt-")) or name.endswith(LIVE):
            raise InvalidRequest(f"{param} must not look like a job or a checkpoint.", param=param)

    @staticmethod
    def check_named(name: str, param: str, key: Key | None) -> None:
        """Raise PermissionDenied for a name that `key` may not give to anything."""
        if key is not None and not sees(key, name):
            raise PermissionDenied(
                f"This API key may not use the name {name!r}, only {', '.join(key.models)}.", param=param
            )

    def check_unaliased(self, name: str, version: int = 0) -> None:
        """Raise FailedPrecondition while an alias means this adapter (0: any version of it)."""
        for alias in self.aliases.values():
            meant, _, number = alias.model.partition("@")
            if meant == name and (not version or number == str(version)):
                raise FailedPrecondition(
                    f"The alias {alias.name!r} means {alias.model!r}; move it or delete it first.",
                    param="model",
                    code="adapter_has_alias",
                )

    def is_base(self, name: str) -> bool:
        """True for one of the base model's names."""
        return name in self._base.names

    def knows(self, name: str) -> bool:
        """True when the name is an adapter in service."""
        with contextlib.suppress(NotFound):
            return bool(self._registry.get(name))
        return False

    def add_checkpoint(
        self, names: Sequence[str], reference: AdapterRef, adapter: str = "", tenant: str | None = None
    ) -> None:
        """Let a checkpoint of a job that publishes under the name `adapter`, or one of `tenant`'s own, answer
        by its own names."""
        for name in names:
            self._checkpoints[name] = NamedCheckpoint(reference, adapter, tenant)

    def _in_service(self, version: AdapterVersion) -> bool:
        with contextlib.suppress(NotFound):
            return bool(self._registry.get(version.name, version.version))
        return False


def ref(version: AdapterVersion) -> AdapterRef:
    """How the engine is told of a version."""
    return AdapterRef(name=version.name, version=version.version, digest=version.digest, path=version.path)
