"""A microbatch: samples packed one after the other into a stream; attention stays inside a sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from coserve.kernels.cross_entropy import IGNORED
from coserve.kernels.dropout import Dropout, row_keys
from coserve.layers.batch import TrainingWindow
from coserve.training.activations import KeysOnly, MicrobatchActivations

Integers = Sequence[int] | np.ndarray
Sample = tuple[Integers, Integers] | tuple[Integers, Integers, Sequence[float] | np.ndarray]


class LoraDropout(NamedTuple):
    """What the dropout masks of a microbatch follow from: each sample is example `examples[i]` of the data in
    optimizer step `step` of the job with this seed."""

    rate: float
    seed: int
    step: int
    examples: Sequence[int]


class Microbatch:
    """The stream of `samples`: (token_ids, labels), labels aligned with tokens, -100 where not trained; a
    third member gives each token's weight as a target (1 without it; 0 is the same as not trained).

    token_ids_T, targets_T, positions_T int64; sample_start_T int32; weights_T fp32. The target at a token is
    the label of the next one of the same sample, and so is its weight. `logprobs_T`, `mean_logprobs_T` (over
    the vocabulary; fp32) and `greedy_T` are the adapter's scores of the targets, `reference_T` the
    reference's log-probabilities; each is there after its units. Whoever owns the memory sets `activations`
    before the first forward window and takes it back (None) after the last unit. Without `dropout`, as in
    evaluation, the adapter sees its whole input.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        device: torch.device | str = "cpu",
        dropout: LoraDropout | None = None,
    ) -> None:
        self.activations: MicrobatchActivations | None = None
        lengths = [len(ids) for ids, *_ in samples]
        starts = np.cumsum([0, *lengths])
        targets = np.full(starts[-1], IGNORED, dtype=np.int64)
        weights = np.ones(starts[-1], dtype=np.float32)
        for start, (_, labels, *given) in zip(starts, samples, strict=False):
            where = slice(start, start + len(labels) - 1)
            targets[where] = np.asarray(labels)[1:]
            if given:
                weights[where] = np.asarray(given[0])[1:]
        targets[weights == 0.0] = IGNORED
        token_ids = np.concatenate([np.asarray(ids, dtype=np.int64) for ids, *_ in samples])
        positions = np.concatenate([np.arange(length, dtype=np.int64) for length in lengths])
        sample_start = np.repeat(starts[:-1], lengths).astype(np.int32)
        self.num_tokens = int(starts[-1])
        self.token_ids_T = torch.from_numpy(token_ids).to(device)
        self.targets_T = torch.from_numpy(targets).to(device)
        self.positions_T = torch.from_numpy(positions).to(device)
        self.sample_start_T = torch.from_numpy(sample_start).to(device)
        self.weights_T = torch.from_numpy(weights).to(device)
        self.logprobs_T = torch.zeros_like(self.weights_T)
        self.mean_logprobs_T = torch.zeros_like(self.weights_T)
        self.reference_T = torch.zeros_like(self.weights_T)
        self.greedy_T = torch.zeros(self.num_tokens, dtype=torch.bool, device=device)
        self.trained_rows = torch.from_numpy(np.flatnonzero(targets != IGNORED)).to(device)
        # Where each sample's trained tokens begin among all trained ones, and the end of the last.
        self.trained_starts = np.concatenate([[0], np.cumsum(targets != IGNORED)])[starts]
        self.dropout_keys_T: torch.Tensor | None = None
        if dropout is not None and dropout.rate > 0:
            keys = [
                row_keys(dropout.seed, dropout.step, example, np.arange(length))
                for example, length in zip(dropout.examples, lengths, strict=True)
            ]
            self.dropout_keys_T = torch.from_numpy(np.concatenate(keys)).to(device)
            self.dropout_rates_S = torch.tensor([dropout.rate], dtype=torch.float64, device=device)

    @property
    def num_trained(self) -> int:
        """Tokens that carry loss."""
        return len(self.trained_rows)

    @property
    def workspace_bytes(self) -> int:
        """Bytes held beside the activations."""
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, torch.Tensor))

    @property
    def saved(self) -> MicrobatchActivations:
        """The activations; ValueError while there is no memory for them."""
        if self.activations is None:
            raise ValueError("the microbatch has no memory for its activations")
        return self.activations

    def window(self, row_start: int, start: int, length: int, *, trains: bool = True) -> TrainingWindow:
        """Tokens [start, start + length) as rows of a forward batch, from row `row_start` on. In a pass that
        doesn't train nothing is kept for a backward and nothing is dropped."""
        saved, starts_W = self.saved, self.sample_start_T[start : start + length]
        if not trains:
            return TrainingWindow(row_start, length, start, starts_W, KeysOnly(saved), saved.x_out_TH)
        dropout = self.dropout(start, length)
        return TrainingWindow(row_start, length, start, starts_W, saved, saved.x_out_TH, dropout)

    def dropout(self, start: int, length: int) -> Dropout | None:
        """Keys and rate of tokens [start, start + length); None where nothing is dropped."""
        if self.dropout_keys_T is None:
            return None
        return Dropout(self.dropout_keys_T[start : start + length], self.dropout_rates_S)

    def dropout_of(self, rows: torch.Tensor) -> Dropout | None:
        """Keys and rate of the tokens `rows`; None where nothing is dropped."""
        if self.dropout_keys_T is None:
            return None
        return Dropout(self.dropout_keys_T[rows], self.dropout_rates_S)
