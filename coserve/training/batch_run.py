"""The microbatches of one optimizer step or one evaluation, from the first forward token to the last unit.

    run = BatchRun(decoder, objective, samples, ...)    sequences for the scheduler, microbatches to run
    run.place(sequence_id, extent, level)               before a microbatch's first forward window
    run.run_units(sequence, length)                     whenever the scheduler says so
    run.sums()                                          loss, count, correct of each, once all are done

With a `Trainee` the last pass of each microbatch adds the gradients of the objective to its adapter; without
one nothing but scores is computed, and only keys, values and the last output are kept of the forward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from coserve.core.training_sequence import TrainingPass, TrainingSequence
from coserve.errors import FailedPrecondition
from coserve.layers.batch import LoraPool
from coserve.models.config import ModelConfig
from coserve.models.decoder import Decoder
from coserve.training.activations import MicrobatchActivations
from coserve.training.backward import MicrobatchBackward, backward_units
from coserve.training.loss import MicrobatchScoring, score_units
from coserve.training.microbatch import LoraDropout, Microbatch, Sample
from coserve.training.objectives import LossSums, Objective
from coserve.training.prefixes import SharedRun
from coserve.training.trainable_adapter import TrainableAdapter
from coserve.training.unit_calls import never
from coserve.worker.kv_tensors import KVTensors


@dataclass(frozen=True)
class Trainee:
    """The adapter in training and the pool rows of its compute weights."""

    adapter: TrainableAdapter
    pool: LoraPool
    rows: Sequence[int]


def check_fits(slabs: int, tokens: int, kv: KVTensors) -> None:
    """Raise FailedPrecondition when a microbatch of `tokens` tokens, which takes so many slabs at the least,
    is more than the whole pool."""
    if slabs > kv.num_blocks:
        raise FailedPrecondition(
            f"{tokens} tokens in training need {slabs * kv.slab_bytes} bytes of the pool, which has "
            f"{kv.nbytes}; raise --kv-cache-memory-bytes or set max_length",
            param="training.max_length",
            code="out_of_memory",
        )


class BatchRun:
    """`samples` holds each microbatch's. `sequences` and `microbatches` go by f"{name}/{index}".

    `adapter` is the one whose objective is taken (None: the base), `reference` the one that an objective
    with `needs_reference` compares it to (None: the base); `rows` are theirs in the `pool`. `dropout` holds
    each microbatch's and acts in the passes that train; `shared` says which samples of each share a prefix.
    The gradient is that of the loss's mean, or with `summed` of its sum.
    Raises FailedPrecondition when a microbatch needs more of the pool `kv` than there is even where every
    layer keeps the least, and ValueError when one has no trained token.
    """

    def __init__(
        self,
        decoder: Decoder,
        objective: Objective,
        samples: Sequence[Sequence[Sample]],
        *,
        name: str,
        job_id: str,
        adapter: str | None,
        reference: str | None = None,
        pool: LoraPool,
        rows: Mapping[str, Sequence[int]],
        trainee: Trainee | None = None,
        dropout: Sequence[LoraDropout] | None = None,
        shared: Sequence[Sequence[SharedRun]] | None = None,
        window_tokens: int = 0,
        summed: bool = False,
        kv: KVTensors,
    ) -> None:
        self._decoder, self._objective, self._trainee = decoder, objective, trainee
        self._pool, self._rows = pool, rows
        self._window_tokens = window_tokens
        self._runners: dict[str, MicrobatchBackward | MicrobatchScoring] = {}
        layers = decoder.config.num_layers
        self._lowest_layer = layers if trainee is None else trainee.adapter.lowest_layer
        self.sequences: list[TrainingSequence] = []
        self.microbatches: dict[str, Microbatch] = {}
        for index, packed in enumerate(samples):
            masks = dropout[index] if dropout else None
            microbatch = Microbatch(packed, decoder.device, masks, shared[index] if shared else ())
            sizes = MicrobatchActivations.level_bytes(*self._shape(microbatch))
            sequence = TrainingSequence(
                f"{name}/{index}",
                job_id,
                index,
                microbatch.num_tokens,
                self._passes(microbatch, adapter, reference),
                level_slabs=tuple(kv.slabs_for(size) for size in sizes),
                head_slabs=MicrobatchActivations.head_bytes(*self._shape(microbatch)) // kv.slab_bytes,
                window_tokens=window_tokens,
            )
            check_fits(sequence.level_slabs[0], microbatch.num_tokens, kv)
            self.sequences.append(sequence)
            self.microbatches[sequence.sequence_id] = microbatch
        self.count = sum(objective.count(microbatch) for microbatch in self.microbatches.values())
        self._grad_scale = 1.0 if summed else 1.0 / self.count

    def _passes(
        self, microbatch: Microbatch, adapter: str | None, reference: str | None
    ) -> tuple[TrainingPass, ...]:
        scores = score_units(microbatch)
        first = (TrainingPass(reference, scores),) if self._objective.needs_reference else ()
        if self._trainee is None:
            return (*first, TrainingPass(adapter, scores))
        units = backward_units(
            microbatch,
            self._objective,
            self._decoder.config.num_layers,
            self._lowest_layer,
            self._window_tokens,
            adapts_head=self._trainee.adapter.adapts_head,
        )
        return (*first, TrainingPass(adapter, units, trains=True))

    @property
    def done(self) -> bool:
        """Every microbatch has run its last unit."""
        return all(sequence.done for sequence in self.sequences)

    @property
    def workspace_bytes(self) -> int:
        """What the microbatches hold beside their activations."""
        return sum(microbatch.workspace_bytes for microbatch in self.microbatches.values())

    def place(self, sequence_id: str, extent: torch.Tensor, level: int) -> None:
        """Give a microbatch memory for its activations, uint8 of the `level`'s size."""
        microbatch = self.microbatches[sequence_id]
        microbatch.activations = MicrobatchActivations(extent, *self._shape(microbatch), level)

    def run_units(
        self, sequence: TrainingSequence, length: int, stop: Callable[[], bool] = never
    ) -> bool:
        """Run the next `length` units of the pass under way as one call, or go on with it; whether it is done
        (see `UnitCalls`). The caller then moves the cursor (`pay_units`). The memory is given up after the
        last pass's last."""
        key = sequence.sequence_id
        runner = self._runners.get(key)
        if runner is None:
            runner = self._runners[key] = self._runner(sequence)
        if not runner.run_next(length, stop):
            return False
        if runner.done:
            del self._runners[key]
            if sequence.pass_index == len(sequence.passes) - 1:
                self.microbatches[key].activations = None
        return True

    def forget(self, sequence_ids: set[str]) -> None:
        """Memory was taken away: the passes under way start over, and calls that rest are dropped."""
        for sequence_id in sequence_ids:
            self.microbatches[sequence_id].activations = None
            self._runners.pop(sequence_id, None)

    def sums(self) -> list[LossSums]:
        """Of each microbatch, in index order, once `done`; `LossSums.total` adds them up."""
        return [self._objective.sums(microbatch) for microbatch in self.microbatches.values()]

    def _runner(self, sequence: TrainingSequence) -> MicrobatchBackward | MicrobatchScoring:
        microbatch, trainee = self.microbatches[sequence.sequence_id], self._trainee
        if not sequence.trains or trainee is None:
            reference = self._objective.needs_reference and sequence.pass_index == 0
            key = sequence.adapter
            head = None if key is None else self._pool.head(self._rows[key])
            return MicrobatchScoring(self._decoder, microbatch, reference=reference, head=head)
        return MicrobatchBackward(
            self._decoder,
            microbatch,
            trainee.adapter,
            trainee.pool,
            trainee.rows,
            grad_scale=self._grad_scale,
            window_tokens=self._window_tokens,
            objective=self._objective,
        )

    def _shape(self, microbatch: Microbatch) -> tuple[ModelConfig, int, int, torch.dtype, int]:
        config = self._decoder.config
        return config, config.num_layers, microbatch.num_tokens, self._decoder.dtype, self._lowest_layer
