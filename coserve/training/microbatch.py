"""A microbatch: samples packed one after the other into a stream; attention stays inside a sample.

Samples that begin alike may share what they begin with: it stands once, before the first of them, and each of
them sees it and then itself, past the others that lie in between (its gap).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from coserve.kernels.cross_entropy import IGNORED
from coserve.kernels.dropout import Dropout, row_keys
from coserve.layers.batch import TrainingWindow
from coserve.training.activations import KeysOnly, MicrobatchActivations
from coserve.training.prefixes import SharedRun

Integers = Sequence[int] | np.ndarray


class Aligned(NamedTuple):
    """A sample that says of each token which one should follow (`targets`, none left out), and what that
    counts (fp32 `weights`, 0 included: it is scored all the same). With `wide` targets and weights [N, K]
    there are several for each; the others are the first of them and their sum."""

    token_ids: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    wide: tuple[np.ndarray, np.ndarray] | None = None


Sample = tuple[Integers, Integers] | tuple[Integers, Integers, Sequence[float] | np.ndarray] | Aligned


class LoraDropout(NamedTuple):
    """What the dropout masks of a microbatch follow from: each sample is example `examples[i]` of the data in
    optimizer step `step` of the job with this seed."""

    rate: float
    seed: int
    step: int
    examples: Sequence[int]


class _Stream:
    """A microbatch's arrays: the rows of each sample, after those of the prefix that its run shares."""

    def __init__(self, samples: Sequence[Sample], runs: Sequence[SharedRun]) -> None:
        self.starts: list[int] = []  # where a sample's own rows begin
        self._end = 0
        self._parts: list[tuple[np.ndarray, ...]] = []
        if sum(run.examples for run in runs) != len(samples):
            raise ValueError(f"{len(samples)} samples in runs of {[run.examples for run in runs]}")
        rest = iter(samples)
        for run in runs:
            first, members = self._end, [next(rest) for _ in range(run.examples)]
            if run.tokens:
                _check_prefix(members, run.tokens)
                self._add(members[0], slice(0, run.tokens), first, (0, 0))
            for sample in members:
                self.starts.append(self._end)
                own = slice(run.tokens, len(sample[0]))
                self._add(sample, own, first, (first + run.tokens, self._end))
        columns = [np.concatenate(column) for column in zip(*self._parts, strict=True)]
        self.token_ids, self.targets, self.weights, self.positions, self.sample_start, self.gaps = columns

    def _add(self, sample: Sample, rows: slice, first: int, gap: tuple[int, int]) -> None:
        """Those rows of a sample that begins at `first`."""
        count = rows.stop - rows.start
        targets, weights = _targets(sample)
        positions = np.arange(rows.start, rows.stop, dtype=np.int64)
        firsts = np.full(count, first, dtype=np.int32)
        gaps = np.full((count, 2), gap, dtype=np.int32)
        ids = np.asarray(sample[0], dtype=np.int64)
        self._parts.append((ids[rows], targets[rows], weights[rows], positions, firsts, gaps))
        self._end += count


def _targets(sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    """Each token's target, IGNORED where it has none, and that target's weight."""
    if isinstance(sample, Aligned):
        return sample.targets, sample.weights
    _, labels, *given = sample
    targets = np.full(len(labels), IGNORED, dtype=np.int64)
    weights = np.ones(len(labels), dtype=np.float32)
    targets[:-1] = np.asarray(labels)[1:]
    if given:
        weights[:-1] = np.asarray(given[0])[1:]
    targets[weights == 0.0] = IGNORED
    return targets, weights


def _check_prefix(samples: Sequence[Sample], tokens: int) -> None:
    first = np.asarray(samples[0][0])[:tokens]
    for ids, *_ in samples:
        if len(ids) <= tokens or not np.array_equal(np.asarray(ids)[:tokens], first):
            raise ValueError(f"the samples don't begin with the same {tokens} tokens")
    of_first, _ = _targets(samples[0])
    for targets, weights in map(_targets, samples):
        counts = (targets[:tokens] != IGNORED) & (weights[:tokens] != 0.0)
        if counts.any() or not np.array_equal(targets[:tokens], of_first[:tokens]):
            raise ValueError(f"the shared {tokens} tokens have targets of their own")


def _widened(samples: Sequence[Sample]) -> tuple[np.ndarray, np.ndarray] | None:
    """Targets and weights [T, K] of samples that all have wide ones; what has fewer counts 0 there."""
    given = [sample.wide for sample in samples if isinstance(sample, Aligned) and sample.wide is not None]
    if not given:
        return None
    most = max(targets.shape[1] for targets, _ in given)
    pairs = [
        [np.pad(array, ((0, 0), (0, most - array.shape[1]))) for array in (targets, weights)]
        for targets, weights in given
    ]
    targets, weights = (np.concatenate(column) for column in zip(*pairs, strict=True))
    return targets, weights


class Microbatch:
    """The stream of `samples`: (token_ids, labels), labels aligned with tokens, -100 where not trained; a
    third member gives each token's weight as a target (1 without it; 0 is the same as not trained). Or
    `Aligned` ones, all of whose tokens are trained ones.

    token_ids_T, targets_T, positions_T int64; sample_start_T int32; weights_T fp32. The target at a token is
    the label of the next one of the same sample, and so is its weight. `shared` says of the samples in order
    which share a prefix (without it none do); `gaps_T2` int32 is None where none do. `logprobs_T`,
    `mean_logprobs_T` (over the vocabulary; fp32) and `greedy_T` are the adapter's scores of the targets,
    `reference_T` the reference's log-probabilities; each is there after its units. `wide_*_TK` are those of
    samples with several targets a token, else None. Whoever owns the memory
    sets `activations` before the first forward window and takes it back (None) after the last unit. Without
    `dropout`, as in evaluation, the adapter sees its whole input. ValueError where samples can't share what
    they should.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        device: torch.device | str = "cpu",
        dropout: LoraDropout | None = None,
        shared: Sequence[SharedRun] = (),
    ) -> None:
        self.activations: MicrobatchActivations | None = None
        runs = shared or [SharedRun(1, 0)] * len(samples)
        parts = _Stream(samples, runs)
        self.num_tokens = len(parts.token_ids)
        self.token_ids_T = torch.from_numpy(parts.token_ids).to(device)
        self.targets_T = torch.from_numpy(parts.targets).to(device)
        self.positions_T = torch.from_numpy(parts.positions).to(device)
        self.sample_start_T = torch.from_numpy(parts.sample_start).to(device)
        self.gaps_T2: torch.Tensor | None = None
        if any(run.tokens for run in runs):
            self.gaps_T2 = torch.from_numpy(parts.gaps).to(device)
        self.weights_T = torch.from_numpy(parts.weights).to(device)
        self.wide_targets_TK: torch.Tensor | None = None
        widened = _widened(samples)
        if widened is not None:
            self.wide_targets_TK, self.wide_weights_TK = (torch.from_numpy(a).to(device) for a in widened)
            self.wide_logprobs_TK = torch.zeros_like(self.wide_weights_TK)
        self.logprobs_T = torch.zeros_like(self.weights_T)
        self.mean_logprobs_T = torch.zeros_like(self.weights_T)
        self.reference_T = torch.zeros_like(self.weights_T)
        self.greedy_T = torch.zeros(self.num_tokens, dtype=torch.bool, device=device)
        is_target = parts.targets != IGNORED
        self.trained_rows = torch.from_numpy(np.flatnonzero(is_target)).to(device)
        # Where each sample's trained tokens begin among all trained ones, and the end of the last.
        self.trained_starts = np.concatenate([[0], np.cumsum(is_target)])[[*parts.starts, self.num_tokens]]
        self.dropout_keys_T: torch.Tensor | None = None
        if dropout is not None and dropout.rate > 0:
            if self.gaps_T2 is not None:
                raise ValueError("samples whose masks differ share no prefix")
            keys = [
                row_keys(dropout.seed, dropout.step, example, np.arange(len(ids)))
                for example, (ids, *_) in zip(dropout.examples, samples, strict=True)
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
        own, saved = slice(start, start + length), self.saved
        return TrainingWindow(
            row_start,
            length,
            start,
            self.sample_start_T[own],
            saved if trains else KeysOnly(saved),
            saved.x_out_TH,
            self.dropout(start, length) if trains else None,
            None if self.gaps_T2 is None else self.gaps_T2[own],
        )

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
