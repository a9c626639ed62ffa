"""What one layer keeps of a microbatch for its backward (graph pruning: only what a gradient needs).

The frozen base needs no weight gradient, so of each linear's input only what an adapter's dA reads is needed,
and that is recomputed where it is cheap: norms, the LoRA bottleneck and the MLP's activated product.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Protocol

import torch


class BlockShape(Protocol):
    """What a decoder block needs to know of the model; `models.ModelConfig` is one."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def qk_norm(self) -> bool: ...
    @property
    def rms_norm_eps(self) -> float: ...
    @property
    def hidden_act(self) -> str: ...


@dataclass
class LayerActivations:
    """Buffers over all T tokens of a microbatch, in the model's dtype but for `lse_TN` (fp32).

    `k_TND`, `v_TND` are there in every layer (later windows attend to them); the rest is None in layers
    below the lowest adapted one, which have no backward. q and k are after norm and RoPE; `qk_raw_TND` holds
    both before the norm, for models that norm them.
    """

    k_TND: torch.Tensor
    v_TND: torch.Tensor
    x_in_TH: torch.Tensor | None = None
    q_TND: torch.Tensor | None = None
    qk_raw_TND: torch.Tensor | None = None
    attn_out_TH: torch.Tensor | None = None
    lse_TN: torch.Tensor | None = None
    x_mid_TH: torch.Tensor | None = None
    gate_up_T2I: torch.Tensor | None = None

    @staticmethod
    def shapes(
        config: BlockShape, tokens: int, dtype: torch.dtype, backward: bool = True
    ) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
        """(name, shape, dtype) of every buffer, for whoever owns the memory."""
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        key = (tokens, kv_heads, dim)
        kept: list[tuple[str, tuple[int, ...], torch.dtype]] = [("k_TND", key, dtype), ("v_TND", key, dtype)]
        if not backward:
            return kept
        if config.qk_norm:
            kept.append(("qk_raw_TND", (tokens, heads + kv_heads, dim), dtype))
        return kept + [
            ("x_in_TH", (tokens, config.hidden_size), dtype),
            ("q_TND", (tokens, heads, dim), dtype),
            ("attn_out_TH", (tokens, heads * dim), dtype),
            ("lse_TN", (tokens, heads), torch.float32),
            ("x_mid_TH", (tokens, config.hidden_size), dtype),
            ("gate_up_T2I", (tokens, 2 * config.intermediate_size), dtype),
        ]

    @classmethod
    def from_buffers(cls, buffers: dict[str, torch.Tensor]) -> LayerActivations:
        """From tensors by the names that `shapes` gave."""
        return cls(**{f.name: buffers[f.name] for f in fields(cls) if f.name in buffers})
