"""Which weights a `model` names."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from coserve.engine.messages import AdapterRef
from coserve.errors import ModelNotFound


@dataclass(frozen=True)
class BaseModel:
    """The one base model that is served: its public name and the other ones it answers to, where it came
    from, its sizes, and which weights it has (models/fingerprint.py)."""

    name: str
    root: str
    max_model_len: int
    vocab_size: int
    created: int = 0
    fingerprint: str = ""
    other_names: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All of its names, the one that answers carry first."""
        return (self.name, *self.other_names)


@dataclass(frozen=True)
class Target:
    """What a request runs on: one immutable adapter version, the adapter of `live_job` in training as of its
    last committed step, or the base where both are empty. `fingerprint` says which weights these are."""

    name: str
    adapter: AdapterRef | None
    live_job: str = ""
    fingerprint: str = ""


def base_model(
    names: Sequence[str], root: str, max_model_len: int, vocab_size: int, fingerprint: str
) -> BaseModel:
    """A BaseModel created now; the first of `names` is the one that answers carry."""
    name, *others = names
    created = int(time.time())
    return BaseModel(name, root, max_model_len, vocab_size, created, fingerprint, tuple(others))


def unknown_model(name: str, base_names: Sequence[str] = ()) -> ModelNotFound:
    """The error for a name that is neither the base nor an adapter. Who writes "base:adapter", which could be
    an adapter's name like any other, is told how adapters are named here."""
    hint = ""
    for base in base_names:
        if name.startswith(f"{base}:"):
            alone = name.removeprefix(f"{base}:")
            hint = f" An adapter is named alone, without its base: {alone[:200]!r}."
    return ModelNotFound(f"The model {name[:200]!r} does not exist.{hint}", param="model")
