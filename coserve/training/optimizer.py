"""AdamW on the adapter's flat buffers, after clipping by the global norm (see kernels/adamw.py)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from coserve.errors import FailedPrecondition, InvalidRequest
from coserve.kernels.adamw import adamw_
from coserve.training.job import TrainingSpec
from coserve.training.trainable_adapter import TrainableAdapter

NORM_CHUNK = 16384  # summed by one thread each, so that the norm doesn't depend on how many there are


def global_norm(gradients: torch.Tensor) -> float:
    """Euclidean norm of a flat tensor, summed in float64 in a fixed order."""
    squares = (chunk.double().square().sum() for chunk in gradients.split(NORM_CHUNK))
    return math.sqrt(math.fsum(torch.stack(list(squares)).tolist()))


class AdamW:
    """Moments fp32, flat; `step_count` optimizer steps done. `max_grad_norm` 0 switches clipping off.

    Raises InvalidRequest for an optimizer other than "adamw".
    """

    def __init__(self, adapter: TrainableAdapter, spec: TrainingSpec) -> None:
        if spec.optimizer != "adamw":
            raise InvalidRequest(
                f"optimizer {spec.optimizer!r} is not supported; use adamw", param="training.optimizer"
            )
        self.adapter = adapter
        self.spec = spec
        self.exp_avg = torch.zeros_like(adapter.parameters)
        self.exp_avg_sq = torch.zeros_like(adapter.parameters)
        self.step_count = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the moments."""
        return self.exp_avg.nbytes + self.exp_avg_sq.nbytes

    def step(self, learning_rate: float) -> float:
        """Update the masters from the finished gradients and return their norm before clipping.

        Raises FailedPrecondition, changing nothing, when the norm isn't finite.
        """
        norm = global_norm(self.adapter.gradients)
        if not math.isfinite(norm):
            raise FailedPrecondition(
                f"training diverged: the gradient of step {self.step_count + 1} is not finite; "
                "lower the learning rate",
                code="training_diverged",
            )
        clip = 1.0
        if self.spec.max_grad_norm > 0:
            clip = min(1.0, self.spec.max_grad_norm / (norm + 1e-6))
        self.step_count += 1
        adamw_(
            self.adapter.parameters,
            self.adapter.gradients,
            self.exp_avg,
            self.exp_avg_sq,
            lr=learning_rate,
            beta1=self.spec.adam_beta1,
            beta2=self.spec.adam_beta2,
            eps=self.spec.adam_epsilon,
            weight_decay=self.spec.weight_decay,
            step=self.step_count,
            grad_scale=clip,
        )
        return norm

    def state(self) -> dict[str, torch.Tensor]:
        """The moments by name, for a checkpoint."""
        return {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}

    def load_state(self, tensors: Mapping[str, torch.Tensor], step_count: int) -> None:
        """Go on from a checkpoint's moments. Raises InvalidRequest when they are of another size."""
        for name, own in self.state().items():
            if name not in tensors or tensors[name].shape != own.shape:
                raise InvalidRequest(f"the checkpoint's {name} doesn't fit the adapter", param="init_from")
            own.copy_(tensors[name])
        self.step_count = step_count
