"""One fine-tuning job in the engine: its adapter, its optimizer, and the optimizer step under way.

Between two steps its whole state is (step, masters, moments): data order, schedule and initial weights follow
from the settings and the seed. So a step can be dropped or restarted at any time and comes out the same.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, wait
from pathlib import Path

import torch
from msgspec.structs import replace

from coserve.core.training_sequence import TrainingSequence
from coserve.layers.pieces import Pieces
from coserve.lora.adapter_pool import AdapterPool
from coserve.models.decoder import Decoder
from coserve.training import checkpoint
from coserve.training.activations import MicrobatchActivations
from coserve.training.batch_run import BatchRun, Trainee, check_fits
from coserve.training.batching import BatchPlan, StepBatch
from coserve.training.dataset import TokenDataset
from coserve.training.divergence import Diverged, LossWatch, diverged
from coserve.training.early_stopping import EvaluationState
from coserve.training.end_tokens import untrained_end_tokens, warning
from coserve.training.evaluation import Evaluation
from coserve.training.job import JobSpec, StepMetrics
from coserve.training.methods import check_data, needs_reference
from coserve.training.microbatch import LoraDropout, Microbatch
from coserve.training.objectives import LossSums, make_objective
from coserve.training.optimizer import global_norm, make_optimizer
from coserve.training.prefixes import longest_sharer
from coserve.training.schedule import Schedule
from coserve.training.trainable_adapter import TrainableAdapter
from coserve.training.unit_calls import never
from coserve.worker.kv_tensors import KVTensors


class RunningJob:
    """A job from its newest whole checkpoint on. `pool` and `rows` are where its compute weights live,
    `reference_rows` where those that it started from stay, for a job that has a `reference_key`.
    `next_rows()` says where an optimizer step's new weights go: other rows while requests read the old ones.

    Raises InvalidRequest or ConfigError when its data or settings don't hold.
    """

    def __init__(
        self,
        spec: JobSpec,
        decoder: Decoder,
        pool: AdapterPool,
        rows: list[int],
        reference_rows: list[int] | None = None,
        next_rows: Callable[[], list[int]] | None = None,
    ) -> None:
        self.spec = spec
        self.paused = False
        self.device_seconds = 0.0
        self._decoder, self._pool, self._rows = decoder, pool, rows
        self._next_rows = next_rows or (lambda: rows)
        self._rows_by_key = {spec.job_id: rows}
        dataset = TokenDataset.open(spec.data_path)
        check_data(spec.method, dataset.pairs)
        self._dataset = dataset
        self._objective = make_objective(spec.method, spec.training)
        self._plan = BatchPlan(
            dataset,
            spec.training,
            spec.seed,
            max_length=decoder.config.max_position_embeddings,
            longest_sharer=longest_sharer(decoder.config, spec.lora.lora_dropout),
        )
        self._schedule = Schedule(spec.training, self._plan.total_steps)
        self._evaluation = (
            Evaluation(spec, spec.validation_path, decoder, self._objective) if spec.validation_path else None
        )
        self._adapter = TrainableAdapter(
            spec.lora,
            decoder.config,
            spec.seed,
            base_model_name=spec.base_model_name,
            device=decoder.device,
        )
        self._optimizer = make_optimizer(self._adapter, spec.training)
        self._watch = LossWatch(self._objective.guess(decoder.config.vocab_size))
        self.step = 0
        self.last_loss = math.nan
        self._saved_step = 0
        self._events: list[StepMetrics] = []  # of the steps since then
        self._unscored: StepMetrics | None = None  # of a committed step that waits for its validation scores
        self._commit: Pieces[StepMetrics] | None = None  # of a step, while it rests
        self._writing: Future[Path] | None = None  # the checkpoint of the last committed step
        self.restored_events: list[StepMetrics] = []
        self.restored_path: str | None = None
        if reference_rows is not None:
            self._rows_by_key[str(self.reference_key(spec))] = reference_rows
            self._load_start()
            self._adapter.place(pool, reference_rows)
        self._restore()
        self._adapter.place(pool, rows)
        self.diverged_step = 0  # the last one that came out non-finite
        self._batch: StepBatch | None = None
        self._run: BatchRun | None = None
        self._began = time.perf_counter()

    @staticmethod
    def rank(spec: JobSpec) -> int:
        """Pool rows that the job's adapter needs."""
        return max([spec.lora.r, *spec.lora.rank_pattern.values()])

    @staticmethod
    def reference_key(spec: JobSpec) -> str | None:
        """The key of the frozen copy that the job compares its adapter to: of the adapter that it starts
        from. None where it needs no reference, and where the reference is the base itself."""
        kept = spec.init_path is not None and needs_reference(spec.method, spec.training)
        return f"{spec.job_id}/start" if kept else None

    @property
    def finished(self) -> bool:
        """All optimizer steps are done, or enough by the validation loss."""
        return self._unscored is None and (
            self.step >= self._plan.total_steps or self._evaluation_state.stopped
        )

    @property
    def _evaluation_state(self) -> EvaluationState:
        return self._evaluation.state if self._evaluation is not None else EvaluationState()

    @property
    def state_bytes(self) -> int:
        """Masters, gradients and moments."""
        return self._adapter.nbytes + self._optimizer.nbytes

    @property
    def sequences(self) -> list[TrainingSequence]:
        """Of the step under way."""
        return self._run.sequences if self._run is not None else []

    @property
    def microbatches(self) -> dict[str, Microbatch]:
        """Of the step under way, by sequence id."""
        return self._run.microbatches if self._run is not None else {}

    @property
    def workspace_bytes(self) -> int:
        """What the plan of its data holds, and the microbatches under way beside their activations."""
        return self._plan.nbytes + (self._run.workspace_bytes if self._run is not None else 0)

    @property
    def kept(self) -> str:
        """What a job that fails now leaves behind."""
        saved = self._saved_step
        return f"the checkpoint of step {saved} is kept" if saved else "there is no checkpoint yet"

    @property
    def unsaved(self) -> bool:
        """There are committed steps that no checkpoint holds."""
        return self._saved_step < self.step

    @property
    def checkpoint_due(self) -> bool:
        """By the job's rule: every `checkpoint_steps`, or at each epoch's end; after the last step, and
        after one whose validation loss is the best so far."""
        every = self.spec.training.checkpoint_steps or self._plan.steps_per_epoch
        best = self.step == self._evaluation_state.best_step
        return self.unsaved and (self.finished or best or self.step % every == 0)

    @property
    def result_path(self) -> str:
        """The checkpoint that the job ends with: its best where it may stop early, else its last."""
        found = checkpoint.whole(self.spec.checkpoint_dir, self._best) if self._best else None
        return str(found or checkpoint.place(self.spec.checkpoint_dir, self.step))

    @property
    def holds_result(self) -> bool:
        """Its rows are what it ends with: those of its last step, where no earlier one was better."""
        return self._best in (0, self.step)

    @property
    def _best(self) -> int:
        return self._evaluation_state.best_step if self.spec.training.early_stopping_patience else 0

    # ------------------------------------------------------------------ what runs next

    def check_memory(self, kv: KVTensors) -> None:
        """Raise FailedPrecondition when the longest example will never fit in the pool `kv`, not even where
        every layer keeps the least: now, not at the step that it belongs to."""
        decoder, tokens = self._decoder, self._plan.longest
        shape = decoder.config, decoder.config.num_layers, tokens, decoder.dtype, self._adapter.lowest_layer
        check_fits(kv.slabs_for(MicrobatchActivations.level_bytes(*shape)[0]), tokens, kv)

    def begin(self, kv: KVTensors) -> None:
        """Make the next microbatches: of the validation set where scores are due, else of the next step.

        Raises FailedPrecondition when one needs more of the pool `kv` than there is even where every layer
        keeps the least (policy C).
        """
        if self._unscored is None:
            self._begin_step(kv)
        else:
            assert self._evaluation is not None
            self._run = self._evaluation.next_run(
                self.step, self._pool, self._rows_by_key, self.reference_key(self.spec), kv
            )

    def complete(self, stop: Callable[[], bool] = never) -> StepMetrics | None:
        """Everything under way has run. Returns the metrics of the optimizer step that is over now; None
        while its validation set is still to be scored, and where its update rests (`is_updating`) after a
        piece because of `stop()`: it goes on when it is asked for again.

        Raises Diverged, with adapter and optimizer as they were, when a loss or the gradient isn't finite;
        FailedPrecondition when the weights aren't after the update.
        """
        metrics = self._unscored
        if metrics is None:
            metrics = self._go_on_committing(stop)
            if metrics is None:
                return None
            if self._evaluation is not None and self._scores_due():
                self._unscored = metrics
                return None
        else:
            assert self._evaluation is not None and self._run is not None
            self._evaluation.take(self._run)
            if not self._evaluation.complete:
                return None
            scores = self._evaluation.conclude(self.step)
            loss = scores.loss if math.isfinite(scores.loss) else None
            metrics = replace(metrics, valid_loss=loss, valid_accuracy=scores.accuracy)
            self._unscored = None
        self._events.append(metrics)
        return metrics

    @property
    def is_updating(self) -> bool:
        """An optimizer step's update rests: neither its old weights nor its new ones are there."""
        return self._commit is not None

    def _go_on_committing(self, stop: Callable[[], bool]) -> StepMetrics | None:
        commit, self._commit = self._commit or self._commit_step(), None
        while True:
            try:
                next(commit)
            except StopIteration as end:
                metrics: StepMetrics = end.value
                return metrics
            if stop():
                self._commit = commit
                return None

    def _scores_due(self) -> bool:
        steps = self._plan.steps_per_epoch, self._plan.total_steps
        return self._evaluation is not None and self._evaluation.due(self.step, *steps)

    # ------------------------------------------------------------------ one optimizer step

    def _begin_step(self, kv: KVTensors) -> None:
        """Make the next step's microbatches; they owe all their tokens.

        Raises FailedPrecondition when one needs more of the pool `kv` than there is even where every layer
        keeps the least (policy C).
        """
        self._batch = self._plan.step(self.step + 1)
        self._adapter.zero_gradients()
        self._began = time.perf_counter()
        self.device_seconds = 0.0
        microbatches, rate = self._batch.microbatches, self.spec.lora.lora_dropout
        self._run = BatchRun(
            self._decoder,
            self._objective,
            [[self._dataset[i] for i in examples] for examples in microbatches],
            name=f"{self.spec.job_id}/{self.step + 1}",
            job_id=self.spec.job_id,
            adapter=self.spec.job_id,
            reference=self.reference_key(self.spec),
            pool=self._pool,
            rows=self._rows_by_key,
            trainee=Trainee(self._adapter, self._pool, self._rows),
            dropout=[LoraDropout(rate, self.spec.seed, self.step + 1, examples) for examples in microbatches],
            shared=self._batch.shared,
            window_tokens=self.spec.training.window_tokens,
            kv=kv,
        )

    def place(self, sequence_id: str, extent: torch.Tensor, level: int) -> None:
        """Give a microbatch memory for its activations, uint8 of the `level`'s size."""
        assert self._run is not None
        self._run.place(sequence_id, extent, level)

    def run_units(
        self, sequence: TrainingSequence, length: int, stop: Callable[[], bool] = never
    ) -> bool:
        """Run the microbatch's next units as one call, or go on with it; whether it is done (`UnitCalls`).
        Its memory is given up after the last."""
        assert self._run is not None
        return self._run.run_units(sequence, length, stop)

    def forget_activations(self, sequence_ids: set[str]) -> None:
        """Memory was taken away. When no microbatch is done any more gradients start over; when all that
        aren't done lost theirs, from what they were after the last one, if that was kept."""
        assert self._run is not None
        self._run.forget(sequence_ids)
        if sequence_ids == self.microbatches.keys():
            self._adapter.zero_gradients()
        elif all(s.sequence_id in sequence_ids for s in self.sequences if not s.done):
            self._adapter.restore_gradients()

    def keep_gradients(self) -> None:
        """A microbatch is done: requests that take the next one's memory don't take its work."""
        self._adapter.keep_gradients()

    def _commit_step(self) -> Pieces[StepMetrics]:
        """Clip, update, write the compute rows."""
        assert self._batch is not None and self._run is not None
        batch, parts = self._batch, self._run.sums()
        for examples, part in zip(batch.microbatches, parts, strict=True):
            if not math.isfinite(part.loss):
                raise Diverged(f"the loss of {_numbered(examples)} is not finite")
        sums = LossSums.total(parts)
        loss = sums.loss / sums.count
        self._adapter.finish_gradients()
        yield
        learning_rate = self._schedule.learning_rate(batch.step)
        norm = yield from self._optimizer.step_pieces(learning_rate)
        if not math.isfinite(global_norm(self._adapter.parameters)):
            raise diverged(batch.step, "its update overflows the weights", self.kept)
        yield
        yield from self._write_rows()
        self.step, self.last_loss = batch.step, loss
        seconds = time.perf_counter() - self._began
        return StepMetrics(
            step=batch.step,
            total_steps=self._plan.total_steps,
            epoch=batch.epoch,
            loss=loss,
            learning_rate=learning_rate,
            grad_norm=norm,
            trained_tokens=batch.trained_tokens,
            tokens=batch.tokens,
            shared_tokens=batch.shared_tokens,
            accuracy=sums.correct / sums.count,
            tokens_per_second=batch.tokens / seconds,
            share=min(1.0, self.device_seconds / seconds),
            time=time.time(),
        )

    def _write_rows(self) -> Pieces[None]:
        """The step's weights into the pool: in place unless somebody reads there."""
        rows = self._next_rows()
        if rows != self._rows:
            self._rows = self._rows_by_key[self.spec.job_id] = rows
            self._pool.place(rows, self._adapter.ranks_LM)
        yield from self._adapter.write_pieces(self._pool, rows)

    def remarks(self, metrics: StepMetrics) -> list[tuple[str, str]]:
        """(level, text) of what is to be said of a step that is over; once for each."""
        said = []
        if metrics.step == 1 and not self._adapter.adapts_head:
            eos, head = self._decoder.config.eos_token_ids, self._decoder.head
            unlearnt = untrained_end_tokens(head, eos, self._dataset.labels)
            said += [("warn", warning(unlearnt))] if unlearnt else []
        if metrics.step == 1 and metrics.shared_tokens:
            computed = metrics.tokens - metrics.shared_tokens
            whole = f"of the first step's {metrics.tokens} tokens {computed} are computed"
            said.append(("info", f"Examples begin alike, and what they share is computed once: {whole}."))
        exploded = self._watch.warning(metrics.step, metrics.loss)
        if exploded is not None:
            said.append(("warn", exploded))
        if metrics.valid_accuracy is not None and metrics.valid_loss is None:
            said.append(("warn", f"Step {metrics.step}: the validation loss is not finite."))
        if self._evaluation is not None and self._evaluation.state.stopped:
            said.append(("info", self._evaluation.verdict))
        return said

    def drop_step(self) -> None:
        """Forget what is under way; `begin` makes it again."""
        self._run = None
        self._batch = None

    # ------------------------------------------------------------------ files

    def write_checkpoint(self, writer: Executor) -> None:
        """Have a thread make the last committed step durable, from where masters and moments lie: the next
        `complete` has to wait until it `is_writing` no more."""
        waiting = [self._unscored] if self._unscored is not None else []
        self._writing = writer.submit(
            checkpoint.writing(
                self.spec.checkpoint_dir,
                self.step,
                self._adapter,
                self._optimizer,
                [*self._events, *waiting],
                self.spec,
                self._evaluation_state,
            )
        )

    @property
    def is_writing(self) -> bool:
        """A checkpoint is on its way to the disk, or `take_checkpoint` hasn't told of it yet."""
        return self._writing is not None

    def take_checkpoint(self, seconds: float | None) -> str | None:
        """The directory of the checkpoint that was being written; None when it isn't done after so many
        seconds (None: waits for it). Raises OSError when the disk refuses."""
        assert self._writing is not None
        if not wait([self._writing], seconds).done:
            return None
        writing, self._writing = self._writing, None
        path = writing.result()
        self._events = []
        self._saved_step = self.step
        return str(path)

    @property
    def checkpoint_steps(self) -> list[int]:
        """The steps whose checkpoints are kept, ascending."""
        return checkpoint.kept_steps(self.spec.checkpoint_dir)

    def _restore(self) -> None:
        found = checkpoint.newest_whole(self.spec.checkpoint_dir, self.spec)
        if found is not None:
            found.load_into(self._adapter, self._optimizer)
            self.step = self._saved_step = found.step
            self.restored_events = found.events
            self.restored_path = str(found.path)
            self.last_loss = found.events[-1].loss if found.events else math.nan
            if self._evaluation is not None:
                self._evaluation.state = found.evaluation
                if self._scores_due():  # it was written before the scores were there
                    self._unscored = self.restored_events.pop()
        elif self.spec.init_path is not None:
            self._load_start()

    def _load_start(self) -> None:
        assert self.spec.init_path is not None
        self._adapter.start_from(self.spec.init_path, self._decoder.config, self._decoder.head)


def _numbered(examples: Sequence[int]) -> str:
    """Example numbers as they are told to people, a few of them."""
    some = ", ".join(str(number) for number in examples[:8])
    return f"example {some}" if len(examples) == 1 else f"examples {some}{', ...' * (len(examples) > 8)}"
