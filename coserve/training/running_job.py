"""One fine-tuning job in the engine: its adapter, its optimizer, and the optimizer step under way.

Between two steps its whole state is (step, masters, moments): data order, schedule and initial weights follow
from the settings and the seed. So a step can be dropped or restarted at any time and comes out the same.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import msgspec
import torch

from coserve.core.training_sequence import TrainingSequence
from coserve.errors import FailedPrecondition
from coserve.lora.adapter_pool import AdapterPool
from coserve.models.config import ModelConfig
from coserve.models.decoder import Decoder
from coserve.training import checkpoint
from coserve.training.activations import MicrobatchActivations
from coserve.training.backward import MicrobatchBackward, backward_units
from coserve.training.batching import BatchPlan, StepBatch
from coserve.training.dataset import TokenDataset
from coserve.training.divergence import Diverged, LossWatch, diverged
from coserve.training.job import JobSpec, StepMetrics
from coserve.training.microbatch import LoraDropout, Microbatch
from coserve.training.optimizer import make_optimizer
from coserve.training.schedule import Schedule
from coserve.training.trainable_adapter import TrainableAdapter
from coserve.worker.kv_tensors import KVTensors


class RunningJob:
    """A job from its newest whole checkpoint on. `pool` and `rows` are where its compute weights live.

    Raises InvalidRequest or ConfigError when its data or settings don't hold.
    """

    def __init__(self, spec: JobSpec, decoder: Decoder, pool: AdapterPool, rows: list[int]) -> None:
        self.spec = spec
        self.paused = False
        self.sequences: list[TrainingSequence] = []
        self.microbatches: dict[str, Microbatch] = {}
        self.device_seconds = 0.0
        self._decoder, self._pool, self._rows = decoder, pool, rows
        dataset = TokenDataset.open(spec.data_path)
        self._dataset = dataset
        self._plan = BatchPlan(
            dataset, spec.training, spec.seed, max_length=decoder.config.max_position_embeddings
        )
        self._schedule = Schedule(spec.training, self._plan.total_steps)
        self._adapter = TrainableAdapter(
            spec.lora,
            decoder.config,
            spec.seed,
            base_model_name=spec.base_model_name,
            device=decoder.device,
        )
        self._optimizer = make_optimizer(self._adapter, spec.training)
        self._watch = LossWatch(decoder.config.vocab_size)
        self.step = 0
        self.last_loss = math.nan
        self._events: list[StepMetrics] = []
        self.restored_events: list[StepMetrics] = []
        self.restored_path: str | None = None
        self._restore()
        self._adapter.place(pool, rows)
        self.diverged_step = 0  # the last one that came out non-finite
        self._batch: StepBatch | None = None
        self._passes: dict[str, MicrobatchBackward] = {}
        self._began = time.perf_counter()

    @staticmethod
    def rank(spec: JobSpec) -> int:
        """Pool rows that the job's adapter needs."""
        return max([spec.lora.r, *spec.lora.rank_pattern.values()])

    @property
    def finished(self) -> bool:
        """All optimizer steps are done."""
        return self.step >= self._plan.total_steps

    @property
    def state_bytes(self) -> int:
        """Masters, gradients and moments."""
        return self._adapter.nbytes + self._optimizer.nbytes

    @property
    def workspace_bytes(self) -> int:
        """What the microbatches under way hold beside their activations."""
        return sum(microbatch.workspace_bytes for microbatch in self.microbatches.values())

    @property
    def kept(self) -> str:
        """What a job that fails now leaves behind."""
        saved = self.step - len(self._events)
        return f"the checkpoint of step {saved} is kept" if saved else "there is no checkpoint yet"

    @property
    def steps_since_checkpoint(self) -> int:
        return len(self._events)

    @property
    def checkpoint_due(self) -> bool:
        """By the job's rule: every `checkpoint_steps`, or at each epoch's end; and after the last step."""
        every = self.spec.training.checkpoint_steps or self._plan.steps_per_epoch
        return self.finished or self.step % every == 0

    # ------------------------------------------------------------------ one optimizer step

    def begin_step(self, kv: KVTensors) -> None:
        """Make the next step's microbatches; they owe all their tokens.

        Raises FailedPrecondition when one needs more of the pool `kv` than there is even where every layer
        keeps the least (policy C).
        """
        self._batch = self._plan.step(self.step + 1)
        self._adapter.zero_gradients()
        self._began = time.perf_counter()
        self.device_seconds = 0.0
        for index, examples in enumerate(self._batch.microbatches):
            dropout = LoraDropout(self.spec.lora.lora_dropout, self.spec.seed, self.step + 1, examples)
            microbatch = Microbatch([self._dataset[i] for i in examples], self._decoder.device, dropout)
            units = backward_units(
                microbatch.num_tokens,
                microbatch.num_trained,
                self._decoder.config.num_layers,
                self._adapter.lowest_layer,
                self.spec.training.window_tokens,
            )
            sizes = MicrobatchActivations.level_bytes(*self._activation_shape(microbatch))
            sequence = TrainingSequence(
                f"{self.spec.job_id}/{self.step + 1}/{index}",
                self.spec.job_id,
                index,
                microbatch.num_tokens,
                units,
                adapter=self.spec.job_id,
                level_slabs=tuple(kv.slabs_for(size) for size in sizes),
                window_tokens=self.spec.training.window_tokens,
            )
            if sequence.level_slabs[0] > kv.num_blocks:
                needed = sequence.level_slabs[0] * kv.slab_bytes
                raise FailedPrecondition(
                    f"{microbatch.num_tokens} tokens in training need {needed} bytes of the pool, which has "
                    f"{kv.nbytes}; raise --kv-cache-memory-bytes or set max_length",
                    code="out_of_memory",
                )
            self.sequences.append(sequence)
            self.microbatches[sequence.sequence_id] = microbatch

    def place(self, sequence_id: str, extent: torch.Tensor, level: int) -> None:
        """Give a microbatch memory for its activations, uint8 of the `level`'s size."""
        microbatch = self.microbatches[sequence_id]
        microbatch.activations = MicrobatchActivations(
            extent, *self._activation_shape(microbatch), level
        )

    def run_backward_unit(self, sequence_id: str) -> None:
        """Run the microbatch's next backward unit; its memory is given up after the last."""
        current = self._passes.get(sequence_id)
        if current is None:
            assert self._batch is not None
            current = self._passes[sequence_id] = MicrobatchBackward(
                self._decoder,
                self.microbatches[sequence_id],
                self._adapter,
                self._pool,
                self._rows,
                grad_scale=1.0 / self._batch.trained_tokens,
                window_tokens=self.spec.training.window_tokens,
            )
        current.run_next()
        if current.done:
            del self._passes[sequence_id]
            self.microbatches[sequence_id].activations = None

    def forget_activations(self, sequence_ids: set[str]) -> None:
        """Memory was taken away. When all microbatches lost theirs, half-made gradients start over."""
        for sequence_id in sequence_ids:
            self.microbatches[sequence_id].activations = None
            self._passes.pop(sequence_id, None)
        if sequence_ids == self.microbatches.keys():
            self._adapter.zero_gradients()

    def commit_step(self) -> StepMetrics:
        """Clip, update, write the compute rows.

        Raises Diverged, with adapter and optimizer as they were, when the loss or the gradient isn't finite;
        FailedPrecondition when the weights aren't after the update.
        """
        assert self._batch is not None
        batch = self._batch
        sums = [microbatch.loss_sum() for microbatch in self.microbatches.values()]
        for examples, loss_sum in zip(batch.microbatches, sums, strict=True):
            if not math.isfinite(loss_sum):
                raise Diverged(f"the loss of {_numbered(examples)} is not finite")
        loss = math.fsum(sums) / batch.trained_tokens
        self._adapter.finish_gradients()
        learning_rate = self._schedule.learning_rate(batch.step)
        norm = self._optimizer.step(learning_rate)
        if not bool(self._adapter.parameters.isfinite().all()):
            raise diverged(batch.step, "its update overflows the weights", self.kept)
        self._adapter.write_rows(self._pool, self._rows)
        self.step, self.last_loss = batch.step, loss
        seconds = time.perf_counter() - self._began
        metrics = StepMetrics(
            step=batch.step,
            total_steps=self._plan.total_steps,
            epoch=batch.epoch,
            loss=loss,
            learning_rate=learning_rate,
            grad_norm=norm,
            trained_tokens=batch.trained_tokens,
            tokens=batch.tokens,
            tokens_per_second=batch.tokens / seconds,
            share=min(1.0, self.device_seconds / seconds),
            time=time.time(),
        )
        self._events.append(metrics)
        return metrics

    def loss_warning(self) -> str | None:
        """What is to be said of the last committed step's loss."""
        return self._watch.warning(self.step, self.last_loss)

    def drop_step(self) -> None:
        """Forget the step under way; `begin_step` makes it again."""
        self.sequences = []
        self.microbatches = {}
        self._passes = {}
        self._batch = None

    def _activation_shape(self, microbatch: Microbatch) -> tuple[ModelConfig, int, int, torch.dtype, int]:
        config, dtype = self._decoder.config, self._decoder.dtype
        return config, config.num_layers, microbatch.num_tokens, dtype, self._adapter.lowest_layer

    # ------------------------------------------------------------------ files

    def write_checkpoint(self) -> str:
        """Make the last committed step durable; returns the checkpoint's directory."""
        path = checkpoint.write(
            self.spec.checkpoint_dir, self.step, self._adapter, self._optimizer, self._events, self.spec
        )
        self._events = []
        return str(path)

    def _restore(self) -> None:
        found = checkpoint.newest_whole(self.spec.checkpoint_dir, self.spec)
        if found is not None:
            found.load_into(self._adapter, self._optimizer)
            self.step = found.step
            self.restored_events = [msgspec.convert(event, StepMetrics) for event in found.events]
            self.restored_path = str(found.path)
            self.last_loss = self.restored_events[-1].loss if self.restored_events else math.nan
        elif self.spec.init_path is not None:
            self._adapter.start_from(self.spec.init_path, self._decoder.config)


def _numbered(examples: Sequence[int]) -> str:
    """Example numbers as they are told to people, a few of them."""
    some = ", ".join(str(number) for number in examples[:8])
    return f"example {some}" if len(examples) == 1 else f"examples {some}{', ...' * (len(examples) > 8)}"
