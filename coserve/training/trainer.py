"""What the engine's steps ask of whoever trains: a job, or a model that is trained by calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch

from coserve.core.training_sequence import TrainingSequence
from coserve.training.microbatch import Microbatch
from coserve.training.unit_calls import never


class Trainer(Protocol):
    """Its sequences owe tokens; `device_seconds` is what they have taken."""

    device_seconds: float

    @property
    def sequences(self) -> list[TrainingSequence]:
        """Those under way."""

    @property
    def microbatches(self) -> Mapping[str, Microbatch]:
        """Of these, by sequence id."""

    @property
    def state_bytes(self) -> int:
        """Masters, gradients and moments."""

    @property
    def workspace_bytes(self) -> int:
        """What it holds outside the pool beside that."""

    def place(self, sequence_id: str, extent: torch.Tensor, level: int) -> None:
        """Give a microbatch memory for its activations, uint8 of the `level`'s size."""

    def run_units(self, sequence: TrainingSequence, length: int, stop: Callable[[], bool] = never) -> bool:
        """Run the microbatch's next units as one call, or go on with it; whether it is done (`UnitCalls`)."""

    def forget_activations(self, sequence_ids: set[str]) -> None:
        """Memory was taken away."""

    def keep_gradients(self) -> None:
        """A microbatch is done: requests that take the next one's memory don't take its work."""
