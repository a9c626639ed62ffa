"""The validation set of a job: when it is scored, in which batches, and what came of it.

The whole set is scored with the weights after an optimizer step, before the next one, as any training work
under the scheduler: some microbatches at a time, in the file's order, forward only. Its loss is that of the
job's own objective, the mean over the set's trained tokens (of preferences, over its pairs).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from msgspec.structs import replace

from coserve.errors import InvalidRequest
from coserve.layers.batch import LoraPool
from coserve.models.decoder import Decoder
from coserve.training.batch_run import BatchRun
from coserve.training.batching import BatchPlan
from coserve.training.dataset import NOT_TRAINED, TokenDataset
from coserve.training.early_stopping import EvaluationState
from coserve.training.job import JobSpec
from coserve.training.methods import check_data
from coserve.training.objectives import LossSums, Objective
from coserve.training.prefixes import longest_sharer
from coserve.worker.kv_tensors import KVTensors

GROUP = 64  # examples (or pairs) whose tokens are in memory at a time


@dataclass(frozen=True)
class ValidationScores:
    """Mean loss and share of right tokens over the whole set."""

    loss: float
    accuracy: float


class Evaluation:
    """A job's validation set and how far its scoring has come.

    Raises InvalidRequest when examples have no trained token, are longer than the model takes or aren't of
    the method's kind, ConfigError when the data can't be read.
    """

    def __init__(self, spec: JobSpec, path: str, decoder: Decoder, objective: Objective) -> None:
        self._spec, self._decoder, self._objective = spec, decoder, objective
        self._dataset = TokenDataset.open(path)
        check_data(spec.method, self._dataset.pairs, param="validation_file")
        _check(self._dataset, decoder.config.max_position_embeddings)
        once = replace(spec.training, batch_size=GROUP, max_steps=0, n_epochs=1, shuffle=False, packing=False)
        sharer = longest_sharer(decoder.config, dropout=0.0)  # scoring passes drop nothing
        self._plan = BatchPlan(self._dataset, once, seed=0, longest_sharer=sharer)
        self._taken = 0
        self._scored: list[LossSums] = []
        self.state = EvaluationState()

    def due(self, step: int, steps_per_epoch: int, total_steps: int) -> bool:
        """Whether the set is to be scored after this optimizer step and hasn't been."""
        every = self._spec.training.eval_steps or steps_per_epoch
        return self.state.evaluated < step and (step % every == 0 or step >= total_steps)

    @property
    def complete(self) -> bool:
        """Every microbatch has been scored."""
        return self._taken == self._plan.total_steps

    def next_run(
        self,
        step: int,
        pool: LoraPool,
        rows: Mapping[str, Sequence[int]],
        reference: str | None,
        kv: KVTensors,
    ) -> BatchRun:
        """The next microbatches to score with the weights after `step`. Arguments and errors as of
        `BatchRun`."""
        batch = self._plan.step(self._taken + 1)
        return BatchRun(
            self._decoder,
            self._objective,
            [[self._dataset[i] for i in examples] for examples in batch.microbatches],
            name=f"{self._spec.job_id}/{step}/validation/{self._taken}",
            job_id=self._spec.job_id,
            adapter=self._spec.job_id,
            reference=reference,
            pool=pool,
            rows=rows,
            shared=batch.shared,
            window_tokens=self._spec.training.window_tokens,
            kv=kv,
        )

    def take(self, run: BatchRun) -> None:
        """The microbatches of `next_run` are scored."""
        self._scored += run.sums()
        self._taken += 1

    def conclude(self, step: int) -> ValidationScores:
        """The set's scores after `step`, once `complete`; the state moves on."""
        total = LossSums.total(self._scored)
        self._scored, self._taken = [], 0
        scores = ValidationScores(total.loss / total.count, total.correct / total.count)
        training = self._spec.training
        self.state = self.state.after(
            step, scores.loss, training.early_stopping_patience, training.early_stopping_threshold
        )
        return scores

    @property
    def verdict(self) -> str:
        """Why the job stopped early."""
        margin, state = self._spec.training.early_stopping_threshold, self.state
        by = f" by more than {margin:g}" if margin else ""
        best = "none was finite"
        if state.best_loss is not None:
            best = f"the best, {state.best_loss:.4f}, came after step {state.best_step}"
        return (
            f"Stopped early after step {state.evaluated}: in {state.misses} evaluations the validation loss "
            f"hasn't improved{by}; {best}."
        )


def _check(dataset: TokenDataset, max_length: int) -> None:
    trained = np.asarray(dataset.labels) != NOT_TRAINED
    trained[dataset.offsets[:-1]] = False
    counts = np.add.reduceat(trained, dataset.offsets[:-1], dtype=np.int64)
    without = np.flatnonzero(counts == 0)
    if len(without):
        raise InvalidRequest(
            f"{len(without)} of {len(counts)} examples of the validation data have no trained token "
            f"(the first is example {without[0]})",
            param="validation_file",
        )
    longest = int(dataset.lengths.max())
    if longest > max_length:
        raise InvalidRequest(
            f"example {int(dataset.lengths.argmax())} of the validation data has {longest} tokens, the model "
            f"takes {max_length}; set max_length",
            param="validation_file",
        )
