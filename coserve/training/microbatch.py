"""A microbatch: samples packed one after the other into a stream; attention stays inside a sample."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from coserve.kernels.linear_cross_entropy import IGNORED
from coserve.layers.batch import TrainingWindow
from coserve.training.activations import MicrobatchActivations


class Microbatch:
    """The stream of `samples` ((token_ids, labels) each; a label stands at its own token, -100: not trained).

    token_ids_T, targets_T, positions_T int64; sample_start_T int32; losses_T fp32. The target at a token is
    the label of the next one of the same sample. `activations` is None until memory is given.
    """

    def __init__(
        self,
        samples: Sequence[tuple[Sequence[int] | np.ndarray, Sequence[int] | np.ndarray]],
        device: torch.device | str = "cpu",
    ) -> None:
        token_ids, targets, positions, starts = [], [], [], []
        begin = 0
        for ids, labels in samples:
            length = len(ids)
            shifted = np.full(length, IGNORED, dtype=np.int64)
            shifted[:-1] = np.asarray(labels, dtype=np.int64)[1:]
            token_ids.append(np.asarray(ids, dtype=np.int64))
            targets.append(shifted)
            positions.append(np.arange(length, dtype=np.int64))
            starts.append(np.full(length, begin, dtype=np.int32))
            begin += length
        self.num_tokens = begin
        self.token_ids_T = torch.from_numpy(np.concatenate(token_ids)).to(device)
        self.targets_T = torch.from_numpy(np.concatenate(targets)).to(device)
        self.positions_T = torch.from_numpy(np.concatenate(positions)).to(device)
        self.sample_start_T = torch.from_numpy(np.concatenate(starts)).to(device)
        self.losses_T = torch.zeros(begin, dtype=torch.float32, device=device)
        self.trained_rows = (self.targets_T != IGNORED).nonzero().flatten()
        self.activations: MicrobatchActivations | None = None

    @property
    def num_trained(self) -> int:
        """Tokens that carry loss."""
        return len(self.trained_rows)

    def window(self, row_start: int, start: int, length: int) -> TrainingWindow:
        """Tokens [start, start + length) as rows of a forward batch. Needs `activations`."""
        if self.activations is None:
            raise ValueError("the microbatch has no memory for its activations yet")
        starts_W = self.sample_start_T[start : start + length]
        return TrainingWindow(row_start, length, start, starts_W, self.activations)

    def loss_sum(self) -> float:
        """Sum of the tokens' losses, exactly rounded so that no order matters; valid after the loss units."""
        return math.fsum(self.losses_T.tolist())
