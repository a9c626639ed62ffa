"""What one layer keeps of a microbatch for its backward (graph pruning: only what a gradient needs).

The frozen base needs no weight gradient, so of each linear's input only what an adapter's dA reads is needed,
and that is recomputed where it is cheap: norms, the LoRA bottleneck and the MLP's activated product. How much
of the rest is kept is the layer's policy (FlexLLM's rematerialisation, chosen by the layer):

    A  keys and values, the layer's input, what attention made, what the MLP made
    B  all but what the MLP made: gate and up are computed again, window by window
    C  keys, values and the input: the layer's forward is computed again as far as its backward looks
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
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
    def whole_qk_norm(self) -> bool: ...
    @property
    def post_norms(self) -> bool: ...
    @property
    def attention_scale(self) -> float: ...
    @property
    def attention_cap(self) -> float: ...
    @property
    def rms_norm_eps(self) -> float: ...
    @property
    def hidden_act(self) -> str: ...


Buffer = tuple[str, tuple[int, ...], torch.dtype]


@dataclass(frozen=True)
class LayerBuffers:
    """(name, shape, dtype) of a layer's buffers, by the part of the forward that fills them."""

    keys: list[Buffer]
    input: list[Buffer]
    attention: list[Buffer]
    mlp: list[Buffer]


@dataclass
class LayerActivations:
    """Buffers over all T tokens of a microbatch, in the model's dtype but for `lse_TN` (fp32).

    `k_TND`, `v_TND` are there in every layer (later windows attend to them). The rest is None where the
    policy doesn't keep it, and in layers below the lowest adapted one, which have no backward. q and k are
    after norm and RoPE; models that norm them have `qk_raw_TND`, both before the norm, in the place of q.
    `attn_raw_TH` and `mlp_raw_TH` hold the output of attention and MLP before the norms that some models put
    there.

    `recomputes`: these are the rows of one window under recomputation. Keys and values stay as they are, and
    what the forward gives to `keep` is held as it comes.
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
    attn_raw_TH: torch.Tensor | None = None
    mlp_raw_TH: torch.Tensor | None = None
    recomputes: bool = False

    def keep(self, stream: slice, **made: torch.Tensor) -> None:
        """Tokens `stream` of the buffers named in `made` got these values; what has no buffer is dropped."""
        for name, value in made.items():
            buffer = getattr(self, name)
            if self.recomputes:
                setattr(self, name, value)
            elif buffer is not None:
                buffer[stream] = value

    def place(self, name: str, stream: slice) -> torch.Tensor | None:
        """Where whoever makes tokens `stream` of a buffer may put them, so that nothing is left to keep; None
        where `keep` has to be asked."""
        buffer: torch.Tensor | None = getattr(self, name)
        return None if self.recomputes or buffer is None else buffer[stream]

    def rows(self, stream: slice) -> LayerActivations:
        """Tokens `stream` of everything but keys and values, to be completed by a recomputation."""
        views = {}
        for held in fields(self):
            value = getattr(self, held.name)
            if isinstance(value, torch.Tensor) and held.name not in ("k_TND", "v_TND"):
                views[held.name] = value[stream]
        return replace(self, recomputes=True, **views)

    @staticmethod
    def buffers(config: BlockShape, tokens: int, dtype: torch.dtype) -> LayerBuffers:
        """Every buffer of a layer, for whoever owns the memory."""
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        key, hidden = (tokens, kv_heads, dim), (tokens, config.hidden_size)
        raw: Buffer = ("qk_raw_TND", (tokens, heads + kv_heads, dim), dtype)
        attention: list[Buffer] = [
            raw if config.qk_norm else ("q_TND", (tokens, heads, dim), dtype),
            ("attn_out_TH", (tokens, heads * dim), dtype),
            ("lse_TN", (tokens, heads), torch.float32),
            ("x_mid_TH", hidden, dtype),
        ]
        if config.post_norms:
            attention += [("attn_raw_TH", hidden, dtype), ("mlp_raw_TH", hidden, dtype)]
        return LayerBuffers(
            keys=[("k_TND", key, dtype), ("v_TND", key, dtype)],
            input=[("x_in_TH", hidden, dtype)],
            attention=attention,
            mlp=[("gate_up_T2I", (tokens, 2 * config.intermediate_size), dtype)],
        )

    @classmethod
    def from_buffers(cls, buffers: dict[str, torch.Tensor]) -> LayerActivations:
        """From tensors by the names that `buffers` gave."""
        return cls(**{f.name: buffers[f.name] for f in fields(cls) if f.name in buffers})
