"""Optimizers on the adapter's flat buffers, after clipping by the norm of its whole gradient.

Parameter groups are spans of the buffers with a learning rate's factor of their own: LoRA+ (Hayou et al.
2024) gives B a multiple of A's. The formulas are in kernels/adamw.py, adamw_8bit.py and sgd.py.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping

import torch

from coserve.errors import InvalidRequest
from coserve.kernels.adamw import adamw_
from coserve.kernels.adamw_8bit import BLOCK, QuantizedMoments, adamw_8bit_
from coserve.kernels.chunk_squares import chunk_squares
from coserve.kernels.sgd import sgd_
from coserve.layers.pieces import Pieces, whole
from coserve.training.divergence import Diverged
from coserve.training.job import TrainingSpec
from coserve.training.job_memory import QUANTIZED_FROM
from coserve.training.trainable_adapter import TrainableAdapter

PIECE = 1 << 20  # elements updated at a time: some milliseconds; a multiple of what the kernels work in

Span = tuple[int, int, float]  # start, end, factor of the learning rate


def global_norm(gradients: torch.Tensor) -> float:
    """Euclidean norm of a flat tensor, summed in float64 in a fixed order; finite if all of it is."""
    return math.sqrt(math.fsum(chunk_squares(gradients).tolist()))


def parameter_groups(adapter: TrainableAdapter, spec: TrainingSpec) -> list[Span]:
    """One span for each trained tensor, in the buffers' order."""
    factors = {"A": 1.0, "B": spec.loraplus_lr_ratio}
    return [(start, end, factors[kind]) for start, end, kind in adapter.spans()]


def joined(spans: list[Span]) -> list[Span]:
    """Neighbours of one factor as one span."""
    whole: list[Span] = []
    for start, end, factor in spans:
        if whole and whole[-1][1:] == (start, factor):
            whole[-1] = (whole[-1][0], end, factor)
        else:
            whole.append((start, end, factor))
    return whole


def cut(spans: list[Span]) -> Iterator[Span]:
    """The spans in pieces of at most `PIECE` elements."""
    for start, end, factor in spans:
        for first in range(start, end, PIECE):
            yield first, min(first + PIECE, end), factor


class Optimizer(ABC):
    """Updates the masters from finished gradients; `step_count` optimizer steps done.

    `max_grad_norm` 0 switches clipping off.
    """

    def __init__(self, adapter: TrainableAdapter, spec: TrainingSpec) -> None:
        self.adapter = adapter
        self.spec = spec
        self.step_count = 0

    def step(self, learning_rate: float) -> float:
        """Update the masters and return the gradient's norm before clipping.

        Raises Diverged, changing nothing, when the norm isn't finite.
        """
        return whole(self.step_pieces(learning_rate))

    def step_pieces(self, learning_rate: float) -> Pieces[float]:
        """As `step`, in pieces."""
        norm = global_norm(self.adapter.gradients)
        if not math.isfinite(norm):
            raise Diverged("its gradient is not finite")
        clip = 1.0
        if self.spec.max_grad_norm > 0:
            clip = min(1.0, self.spec.max_grad_norm / (norm + 1e-6))
        self.step_count += 1
        yield
        yield from self._update(learning_rate, clip)
        return norm

    @property
    def nbytes(self) -> int:
        """Bytes of its state."""
        return sum(tensor.nbytes for tensor in self.state().values())

    @abstractmethod
    def _update(self, learning_rate: float, grad_scale: float) -> Pieces[None]:
        """Optimizer step `step_count` on gradients times `grad_scale`, in pieces."""

    @abstractmethod
    def state(self) -> dict[str, torch.Tensor]:
        """All that the next step depends on beside masters and `step_count`, by name, for a checkpoint."""

    def load_state(self, tensors: Mapping[str, torch.Tensor], step_count: int) -> None:
        """Go on from a checkpoint's state. Raises InvalidRequest when it is another optimizer's or size's."""
        own = self.state()
        wrong = sorted(own.keys() ^ tensors.keys())
        wrong += [
            name
            for name, tensor in own.items()
            if name in tensors
            and (tensors[name].shape != tensor.shape or tensors[name].dtype != tensor.dtype)
        ]
        if wrong:
            raise InvalidRequest(f"the checkpoint's {wrong[0]} doesn't fit the optimizer", param="init_from")
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
        self.step_count = step_count


class AdamW(Optimizer):
    """Moments fp32, flat. Decay is decoupled, as torch.optim.AdamW's."""

    def __init__(self, adapter: TrainableAdapter, spec: TrainingSpec) -> None:
        super().__init__(adapter, spec)
        self._spans = joined(parameter_groups(adapter, spec))
        self.exp_avg = torch.zeros_like(adapter.parameters)
        self.exp_avg_sq = torch.zeros_like(adapter.parameters)

    def _update(self, learning_rate: float, grad_scale: float) -> Pieces[None]:
        for start, end, factor in cut(self._spans):
            adamw_(
                self.adapter.parameters[start:end],
                self.adapter.gradients[start:end],
                self.exp_avg[start:end],
                self.exp_avg_sq[start:end],
                lr=learning_rate * factor,
                beta1=self.spec.adam_beta1,
                beta2=self.spec.adam_beta2,
                eps=self.spec.adam_epsilon,
                weight_decay=self.spec.weight_decay,
                step=self.step_count,
                grad_scale=grad_scale,
            )
            yield

    def state(self) -> dict[str, torch.Tensor]:
        return {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}


class AdamW8bit(Optimizer):
    """Moments in 8 bits by blocks of 256, a quarter of the bytes; fp32 for tensors under 4096 elements."""

    def __init__(self, adapter: TrainableAdapter, spec: TrainingSpec) -> None:
        super().__init__(adapter, spec)
        groups = parameter_groups(adapter, spec)
        device = adapter.parameters.device
        large = [span for span in groups if span[1] - span[0] >= QUANTIZED_FROM]
        self._moments = QuantizedMoments.zeros(large, device)
        self._small = [span for span in groups if span[1] - span[0] < QUANTIZED_FROM]
        count = sum(end - start for start, end, _ in self._small)
        self._exp_avg = torch.zeros(count, device=device)
        self._exp_avg_sq = torch.zeros(count, device=device)

    def _update(self, learning_rate: float, grad_scale: float) -> Pieces[None]:
        spec, adapter = self.spec, self.adapter
        rule = {
            "beta1": spec.adam_beta1,
            "beta2": spec.adam_beta2,
            "eps": spec.adam_epsilon,
            "weight_decay": spec.weight_decay,
            "grad_scale": grad_scale,
        }
        blocks = len(self._moments.starts_B)
        for first in range(0, blocks, PIECE // BLOCK):
            adamw_8bit_(
                adapter.parameters,
                adapter.gradients,
                self._moments.blocks(first, first + PIECE // BLOCK),
                lr=learning_rate,
                step=self.step_count,
                **rule,
            )
            yield
        place = 0
        for start, end, factor in self._small:
            own = slice(place, place + end - start)
            adamw_(
                adapter.parameters[start:end],
                adapter.gradients[start:end],
                self._exp_avg[own],
                self._exp_avg_sq[own],
                lr=learning_rate * factor,
                step=self.step_count,
                **rule,
            )
            place = own.stop

    @property
    def nbytes(self) -> int:
        return self._moments.nbytes + self._exp_avg.nbytes + self._exp_avg_sq.nbytes

    def state(self) -> dict[str, torch.Tensor]:
        moments = self._moments
        return {
            "exp_avg_code": moments.m_BE,
            "exp_avg_scale": moments.m_scale_B,
            "exp_avg_sq_code": moments.v_BE,
            "exp_avg_sq_scale": moments.v_scale_B,
            "exp_avg": self._exp_avg,
            "exp_avg_sq": self._exp_avg_sq,
        }


class SGD(Optimizer):
    """With `momentum`; 0 keeps no state. Decay is part of the gradient, as torch.optim.SGD's."""

    def __init__(self, adapter: TrainableAdapter, spec: TrainingSpec) -> None:
        super().__init__(adapter, spec)
        self._spans = joined(parameter_groups(adapter, spec))
        self._buffer = torch.zeros_like(adapter.parameters) if spec.momentum else None

    def _update(self, learning_rate: float, grad_scale: float) -> Pieces[None]:
        for start, end, factor in cut(self._spans):
            sgd_(
                self.adapter.parameters[start:end],
                self.adapter.gradients[start:end],
                None if self._buffer is None else self._buffer[start:end],
                lr=learning_rate * factor,
                momentum=self.spec.momentum,
                weight_decay=self.spec.weight_decay,
                grad_scale=grad_scale,
            )
            yield

    def state(self) -> dict[str, torch.Tensor]:
        return {} if self._buffer is None else {"momentum_buffer": self._buffer}


OPTIMIZERS: dict[str, type[Optimizer]] = {"adamw": AdamW, "adamw_8bit": AdamW8bit, "sgd": SGD}


def make_optimizer(adapter: TrainableAdapter, spec: TrainingSpec) -> Optimizer:
    """The optimizer that the settings name. Raises InvalidRequest for an unknown one."""
    if spec.optimizer not in OPTIMIZERS:
        raise InvalidRequest(
            f"unknown optimizer {spec.optimizer!r}: use one of {', '.join(OPTIMIZERS)}",
            param="training.optimizer",
        )
    return OPTIMIZERS[spec.optimizer](adapter, spec)
