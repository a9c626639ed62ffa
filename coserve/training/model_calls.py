"""What is asked of a model that is trained by calls, and what comes of it. Torch-free plain data.

Arrays cross as raw little-endian bytes: a pass may hold some hundred thousand tokens, which a step can't wait
to be read number by number.
"""

from __future__ import annotations

import msgspec
import numpy as np

LOSSES = ("cross_entropy", "importance_sampling", "ppo", "cispo", "dro")
POLICY_LOSSES = LOSSES[1:]  # compare the policy to the one that sampled, by its log-probabilities


class _Call(msgspec.Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """Base of the calls."""


class Datum(msgspec.Struct, frozen=True, array_like=True):
    """N tokens (int32), the token that each should be followed by (`targets`, int32), and what each target
    counts: its weight, or the advantage of having chosen it (`coefficients`, fp32). `sampled_logprobs` (fp32)
    are the log-probabilities under the policy that chose the targets; empty where the loss reads none. With a
    `width` K over 1 targets and coefficients are [N, K]."""

    tokens: bytes
    targets: bytes
    coefficients: bytes
    sampled_logprobs: bytes = b""
    width: int = 1


class LossSettings(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A loss and its own settings: the ratio's bounds of ppo and cispo, the penalty of dro."""

    name: str = "cross_entropy"
    clip_low: float = 0.8
    clip_high: float = 1.2
    beta: float = 0.05


class Pass(_Call):
    """Score `data`; with `backward` add the gradient of the summed loss to what is there already."""

    data: list[Datum]
    loss: LossSettings
    backward: bool = True

    @property
    def is_wide(self) -> bool:
        """Some token has several targets."""
        return any(datum.width > 1 for datum in self.data)

    @property
    def trained_tokens(self) -> int:
        """Targets that count."""
        return sum(np.count_nonzero(np.frombuffer(datum.coefficients, "<f4")) for datum in self.data)


class AdamParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Of one update. `grad_clip_norm` 0: no clipping."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


class Update(_Call):
    """One step of AdamW with the gradients since the last; then there are none."""

    adam: AdamParams


class Save(_Call):
    """Make the weights, and with `optimizer` its state, durable in a new directory."""

    directory: str
    optimizer: bool


class Load(_Call):
    """Set the weights from a saved directory, and the optimizer's state or zeros. Gradients are dropped."""

    directory: str
    optimizer: bool


ModelCall = Pass | Update | Save | Load


class CallResult(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`logprobs` (fp32 bytes) are those of each datum's targets, [N, width] where `widths` are given; metrics
    are named "name:reduction"."""

    logprobs: list[bytes] = []
    widths: list[int] = []
    metrics: dict[str, float] = {}
