"""Attention of a block: merged q, k, v product, norms and RoPE, attention by kind of row, output product.

Inference rows read and write the paged cache; the rows of a training window read and write the keys and
values of their own microbatch, which no request ever sees.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from coserve.kernels.lora import ModuleGradient
from coserve.kernels.norm_rope_store import CacheSlots, HeadNorms, norm_rope_store
from coserve.kernels.paged_attention import paged_attention
from coserve.kernels.rope import apply_rope_
from coserve.kernels.window_attention import window_attention, window_attention_backward
from coserve.layers.activations import BlockShape, LayerActivations
from coserve.layers.batch import BackwardWindow, ForwardBatch, TrainingWindow
from coserve.layers.linear import AdaptedLinear
from coserve.layers.norm import RMSNorm
from coserve.layers.pieces import Pieces


@dataclass(frozen=True)
class RopeTable:
    """cos and sin, fp32 [P, D/2], shared by all layers."""

    cos: torch.Tensor
    sin: torch.Tensor


class Attention:
    """Grouped-query attention; `q_norm`, `k_norm` are None in families that don't norm q and k.

    A query sees `window` keys, its own among them, or with 0 all before it.
    """

    def __init__(
        self,
        config: BlockShape,
        qkv: AdaptedLinear,
        out: AdaptedLinear,
        rope: RopeTable,
        q_norm: RMSNorm | None = None,
        k_norm: RMSNorm | None = None,
        window: int = 0,
    ) -> None:
        self.heads, self.kv_heads, self.dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.qkv = qkv
        self.out = out
        self.rope = rope
        self.q_norm = q_norm
        self.k_norm = k_norm
        self.norms = None
        if q_norm is not None and k_norm is not None:
            self.norms = HeadNorms(q_norm.weight, k_norm.weight, q_norm.eps)
        self.whole_norm = config.whole_qk_norm
        self.window = window
        self.scale, self.soft_cap = config.attention_scale, config.attention_cap

    def forward(
        self, x_TH: torch.Tensor, batch: ForwardBatch, layer: int, h_MPTR: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[T, H] of normed input [T, H], with the h of q, k and v if it came with that."""
        q_TND, k_TND, v_TND = self._project(x_TH, batch, layer, h_MPTR)
        parts = []
        if batch.inference is not None:
            rows = batch.inference
            n = rows.rows
            k_cache, v_cache = rows.kv.layer(layer)
            tables = rows.block_tables_SB, rows.query_start_S1, rows.context_lens_S
            how = self.scale, self.window, self.soft_cap
            parts.append(paged_attention(q_TND[:n], k_cache, v_cache, *tables, *how))
        for window in batch.windows:
            rows_of = window.batch_rows
            positions_W = batch.positions_T[rows_of]
            parts.append(
                self._window(q_TND[rows_of], k_TND[rows_of], v_TND[rows_of], positions_W, window, layer)
            )
        o_TND = parts[0] if len(parts) == 1 else torch.cat(parts)
        return self.out.forward(o_TND.reshape(len(x_TH), -1), batch.lora, layer)

    def _project(
        self, x_TH: torch.Tensor, batch: ForwardBatch, layer: int, h_MPTR: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k (normed, rotated) and v, [T, heads, D]; the inference rows' k and v are in the cache then."""
        qkv_TN = self.qkv.forward(x_TH, batch.lora, layer, h_MPTR=h_MPTR)
        qkv_TMD = qkv_TN.view(len(x_TH), -1, self.dim)
        if self.norms is not None:
            for window in batch.windows:
                raw_WMD = qkv_TMD[window.batch_rows, : self.heads + self.kv_heads]
                window.saved.layer(layer).keep(window.stream, qk_raw_TND=raw_WMD)
        rows = batch.inference
        cache = None if rows is None else CacheSlots(*rows.kv.layer(layer), rows.slots_T)
        rope = batch.positions_T, self.rope.cos, self.rope.sin
        return norm_rope_store(qkv_TMD, self.heads, *rope, self.norms, cache)

    def _norm(self, norm: RMSNorm, x_TND: torch.Tensor) -> torch.Tensor:
        """Each head by itself, or a token's whole projection."""
        return norm.forward(x_TND.flatten(1)).view(x_TND.shape) if self.whole_norm else norm.forward(x_TND)

    def _norm_backward(self, norm: RMSNorm, dy_WND: torch.Tensor, x_WND: torch.Tensor) -> torch.Tensor:
        dy, x = dy_WND.contiguous(), x_WND.contiguous()
        if self.whole_norm:
            return norm.backward(dy.flatten(1), x.flatten(1)).view(dy.shape)
        return norm.backward(dy, x)

    def _rotate(self, x_TND: torch.Tensor, positions_T: torch.Tensor, inverse: bool = False) -> torch.Tensor:
        return apply_rope_(x_TND, positions_T, self.rope.cos, self.rope.sin, inverse)

    def _window(
        self,
        q_WND: torch.Tensor,
        k_WND: torch.Tensor,
        v_WND: torch.Tensor,
        positions_W: torch.Tensor,
        window: TrainingWindow,
        layer: int,
    ) -> torch.Tensor:
        """Attention of one training window; keeps what its backward needs."""
        saved, stream = window.saved.layer(layer), window.stream
        if not saved.recomputes:
            saved.keep(stream, k_TND=k_WND, v_TND=v_WND)
        o_WND, lse_WN = window_attention(
            q_WND,
            saved.k_TND,
            saved.v_TND,
            self._first_keys(window.sample_start_W, positions_W, window.window_start),
            window.window_start,
            self.scale,
            self.soft_cap,
            window.gaps_W2,
        )
        saved.keep(stream, q_TND=q_WND, attn_out_TH=o_WND.reshape(window.rows, -1), lse_TN=lse_WN)
        return o_WND

    def _queries(self, saved: LayerActivations, window: BackwardWindow) -> torch.Tensor:
        """q as attention saw it: kept, or made again of what was kept before its norm."""
        if saved.q_TND is not None:
            return saved.q_TND
        assert saved.qk_raw_TND is not None and self.q_norm is not None
        q_WND = self._norm(self.q_norm, saved.qk_raw_TND[:, : self.heads])
        return self._rotate(q_WND, window.positions_T[window.stream])

    def _first_keys(
        self, sample_start_W: torch.Tensor, positions_W: torch.Tensor, start: int
    ) -> torch.Tensor:
        """int32 [W]: the first key that each query of a window from `start` on sees. A sample that shares a
        prefix is no longer than the sliding window, so a query beyond that has no gap before it."""
        if not self.window:
            return sample_start_W
        oldest = start + 1 - self.window
        end, device = oldest + len(sample_start_W), sample_start_W.device
        oldest_W = torch.arange(oldest, end, dtype=torch.int32, device=device)
        return torch.where(positions_W < self.window, sample_start_W, oldest_W)

    def is_adapted(self, lora: dict[int, ModuleGradient]) -> bool:
        """Some projection has an adapter among `lora`."""
        return self.qkv.is_adapted(lora) or self.out.is_adapted(lora)

    def backward(
        self, dy_WH: torch.Tensor, x_WH: torch.Tensor, saved: LayerActivations, window: BackwardWindow
    ) -> Pieces[torch.Tensor | None]:
        """Gradient w.r.t. the normed input `x` [W, H]; None where nobody needs it. In pieces. `saved` is
        complete, and the window's own. Its keys have got all their gradients when its own queries are done,
        since later windows went before."""
        stream = window.stream
        assert saved.attn_out_TH is not None and saved.lse_TN is not None
        width, m = window.end - window.start, self.heads + self.kv_heads
        o_WH, lora, start = saved.attn_out_TH, window.lora, window.start
        if window.lowest and not self.qkv.is_adapted(lora):
            self.out.backward_adapter(dy_WH, lambda: o_WH, lora, start)
            return None
        do_WH = self.out.backward(dy_WH, lambda: o_WH, lora, start)
        yield
        shape = (width, self.heads, self.dim)
        dq_WND = window_attention_backward(
            do_WH.view(shape),
            self._queries(saved, window),
            o_WH.view(shape),
            saved.lse_TN,
            saved.k_TND,
            saved.v_TND,
            self._first_keys(window.sample_start_T[stream], window.positions_T[stream], window.start),
            window.start,
            self.scale,
            window.dk_TND,
            window.dv_TND,
            self.soft_cap,
            window.gaps_W2,
        )
        yield
        dqkv_WMD = dq_WND.new_empty(width, m + self.kv_heads, self.dim)
        dqkv_WMD[:, : self.heads] = dq_WND
        dqkv_WMD[:, self.heads : m] = window.dk_TND[stream]
        dqkv_WMD[:, m:] = window.dv_TND[stream]
        self._rotate(dqkv_WMD[:, :m], window.positions_T[stream], inverse=True)
        if self.q_norm is not None and self.k_norm is not None:
            assert saved.qk_raw_TND is not None
            raw_WMD, n = saved.qk_raw_TND, self.heads
            dqkv_WMD[:, :n] = self._norm_backward(self.q_norm, dqkv_WMD[:, :n], raw_WMD[:, :n])
            dqkv_WMD[:, n:m] = self._norm_backward(self.k_norm, dqkv_WMD[:, n:m], raw_WMD[:, n:])
        dqkv_WN = dqkv_WMD.view(width, -1)
        if window.lowest:
            self.qkv.backward_adapter(dqkv_WN, lambda: x_WH, lora, start)
            return None
        return self.qkv.backward(dqkv_WN, lambda: x_WH, lora, start)
