"""The decoder that all families share, forward and backward. Run it under torch.inference_mode or no_grad.

x -> x + post(attention(pre(x))) -> x + post(mlp(pre(x))),   layer by layer; final norm; head

`pre` and `post` are RMS norms or nothing, by family: Llama has the first, OLMo 2 the second, Gemma both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from coserve.kernels.lora import ModuleGradient
from coserve.kernels.soft_cap import soft_cap_
from coserve.layers.activations import LayerActivations
from coserve.layers.attention import Attention
from coserve.layers.batch import BackwardWindow, ForwardBatch
from coserve.layers.embedding import Embedding
from coserve.layers.lm_head import HeadRun, LMHead
from coserve.layers.mlp import MLP
from coserve.layers.norm import RMSNorm
from coserve.layers.pieces import Pieces, whole
from coserve.models.config import ModelConfig

PIECES = 2  # of a layer's forward


class DecoderLayer:
    """One block; norms that its family hasn't are None."""

    def __init__(
        self,
        attn_norm: RMSNorm | None,
        attention: Attention,
        mlp_norm: RMSNorm | None,
        mlp: MLP,
        attn_post_norm: RMSNorm | None = None,
        mlp_post_norm: RMSNorm | None = None,
    ) -> None:
        self.attn_norm = attn_norm
        self.attention = attention
        self.mlp_norm = mlp_norm
        self.mlp = mlp
        self.attn_post_norm = attn_post_norm
        self.mlp_post_norm = mlp_post_norm

    def forward(self, x_TH: torch.Tensor, batch: ForwardBatch, layer: int) -> Pieces[torch.Tensor]:
        """[T, H] of [T, H]; training rows leave behind what their backward needs. In pieces: attention, MLP.
        What training keeps may change hands between them, as neither reads there what the other wrote."""
        for window in batch.windows:
            window.saved.layer(layer).keep(window.stream, x_in_TH=x_TH[window.batch_rows])
        normed_TH, x_mid_TH, h_MPTR = self._attend(x_TH, batch, layer)
        yield
        y_TH = self.mlp.forward(normed_TH, batch, layer, h_MPTR)
        if self.mlp_post_norm is not None:
            for window in batch.windows:
                window.saved.layer(layer).keep(window.stream, mlp_raw_TH=y_TH[window.batch_rows])
            y_TH = self.mlp_post_norm.forward(y_TH)
        return y_TH.add_(x_mid_TH)

    def _attend(
        self, x_TH: torch.Tensor, batch: ForwardBatch, layer: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The attention half: (normed input of the MLP, x_mid), [T, H] each, and gate's and up's h where it
        comes with the first."""
        normed_TH, h_MPTR = x_TH, None
        if self.attn_norm is not None:
            adapters = self.attention.qkv.adapters(batch.lora, layer)
            normed_TH, _, h_MPTR = self.attn_norm.shrink_forward(x_TH, None, adapters)
        attended_TH = self.attention.forward(normed_TH, batch, layer, h_MPTR)
        if self.attn_post_norm is not None:
            for window in batch.windows:
                window.saved.layer(layer).keep(window.stream, attn_raw_TH=attended_TH[window.batch_rows])
            attended_TH = self.attn_post_norm.forward(attended_TH)
        if self.mlp_norm is not None:
            adapters = self.mlp.gate_up.adapters(batch.lora, layer)
            normed_TH, x_mid_TH, h_MPTR = self.mlp_norm.shrink_forward(attended_TH, x_TH, adapters)
        else:
            normed_TH, h_MPTR = attended_TH.add_(x_TH), None
            x_mid_TH = normed_TH
        for window in batch.windows:
            window.saved.layer(layer).keep(window.stream, x_mid_TH=x_mid_TH[window.batch_rows])
        return normed_TH, x_mid_TH, h_MPTR

    def _complete(self, window: BackwardWindow) -> Pieces[tuple[LayerActivations, torch.Tensor]]:
        """The window's own activations with what the policy dropped computed again by the forward's own
        parts, and the MLP's normed input [W, H]. In pieces."""
        saved = window.saved.rows(window.stream)
        assert saved.x_in_TH is not None
        batch = window.forward_batch(saved)
        if saved.x_mid_TH is None:
            normed_WH, _, h_MPTR = self._attend(saved.x_in_TH, batch, window.layer)
            yield
        else:
            normed_WH, h_MPTR = _normed(self.mlp_norm, saved.x_mid_TH), None
        if saved.gate_up_T2I is None:
            self.mlp.forward_gate_up(normed_WH, batch, window.layer, h_MPTR)
            yield
        if self.mlp_post_norm is not None and saved.mlp_raw_TH is None:
            assert saved.gate_up_T2I is not None
            saved.mlp_raw_TH = self.mlp.forward_down(saved.gate_up_T2I, batch, window.layer)
        return saved, normed_WH

    def backward(self, dy_WH: torch.Tensor, window: BackwardWindow) -> Pieces[torch.Tensor | None]:
        """Gradient w.r.t. the window's input [W, H] of that w.r.t. its output, None in the lowest adapted
        layer; adds the adapters' gradients and those of the keys and values it saw. In pieces; nothing that
        the window reads may change hands while it rests."""
        saved, normed_WH = yield from self._complete(window)
        x_in_WH, x_mid_WH = saved.x_in_TH, saved.x_mid_TH
        assert x_in_WH is not None and x_mid_WH is not None
        ends_here = window.lowest and not self.attention.is_adapted(window.lora)
        dmlp_WH = _norm_gradient(self.mlp_post_norm, dy_WH, saved.mlp_raw_TH)
        dnormed_WH = yield from self.mlp.backward(
            dmlp_WH, normed_WH, saved, window, needs_input=not ends_here
        )
        if dnormed_WH is None:
            return None
        yield
        dx_mid_WH = _norm_gradient(self.mlp_norm, dnormed_WH, x_mid_WH).add_(dy_WH)
        dattended_WH = _norm_gradient(self.attn_post_norm, dx_mid_WH, saved.attn_raw_TH)
        x_WH = _normed(self.attn_norm, x_in_WH)
        dnormed_WH = yield from self.attention.backward(dattended_WH, x_WH, saved, window)
        if dnormed_WH is None:
            return None
        return _norm_gradient(self.attn_norm, dnormed_WH, x_in_WH).add_(dx_mid_WH)


def _normed(norm: RMSNorm | None, x_TH: torch.Tensor) -> torch.Tensor:
    return x_TH if norm is None else norm.forward(x_TH)


def _norm_gradient(norm: RMSNorm | None, dy_WH: torch.Tensor, x_WH: torch.Tensor | None) -> torch.Tensor:
    """Gradient w.r.t. the norm's input `x`; `dy` itself where there is no norm."""
    if norm is None:
        return dy_WH
    assert x_WH is not None
    return norm.backward(dy_WH, x_WH)


class Decoder:
    """A frozen base model on one device, in one dtype (`loader.py` makes it)."""

    def __init__(
        self,
        config: ModelConfig,
        embedding: Embedding,
        layers: list[DecoderLayer],
        norm: RMSNorm,
        head: LMHead,
    ) -> None:
        self.config = config
        self.embedding = embedding
        self.layers = layers
        self.norm = norm
        self.head = head

    @property
    def dtype(self) -> torch.dtype:
        """The activations' dtype."""
        return self.head.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.head.device

    @property
    def nbytes(self) -> int:
        """Bytes of the base's matrices and biases as they are held; a shared table counts once."""
        total = self.head.nbytes + self.embedding.nbytes
        for layer in self.layers:
            merged = layer.attention.qkv, layer.attention.out, layer.mlp.gate_up, layer.mlp.down
            total += sum(linear.packed.nbytes for linear in merged)
        return total

    def embed(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        """[T, H] of int64 token ids."""
        return self.embedding.forward(token_ids_T)

    def forward_pieces(self, x_TH: torch.Tensor, batch: ForwardBatch) -> Pieces[torch.Tensor]:
        """All layers over the batch's rows, in `PIECES` a layer. After the last one the training windows keep
        their output, which the loss starts from."""
        for number, layer in enumerate(self.layers):
            if number:
                yield
            x_TH = yield from layer.forward(x_TH, batch, number)
        for window in batch.windows:
            if window.x_out_TH is not None:
                window.x_out_TH[window.stream] = x_TH[window.batch_rows]
        return x_TH

    def forward_layers(self, x_TH: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        """As `forward_pieces`, at once."""
        return whole(self.forward_pieces(x_TH, batch))

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """Embedding and all layers: [T, H] before the final norm."""
        return self.forward_layers(self.embed(batch.token_ids_T), batch)

    def final_norm(self, x_TH: torch.Tensor) -> torch.Tensor:
        """What the head reads; rows stand alone, so only those that need logits have to be given."""
        return self.norm.forward(x_TH)

    def head_forward(self, x_CH: torch.Tensor, runs: Sequence[HeadRun] = ()) -> Pieces[torch.Tensor]:
        """Logits [C, V], capped where the model caps them, in its dtype, of the last layer's output. In
        pieces."""
        logits_CV = yield from self.head.forward_pieces(self.final_norm(x_CH), runs)
        cap = self.config.logit_cap
        return soft_cap_(logits_CV, cap) if cap else logits_CV

    def head_backward(
        self,
        dlogits_CV: torch.Tensor,
        x_CH: torch.Tensor,
        gradient: ModuleGradient | None = None,
        token_offset: int = 0,
        needs_input: bool = True,
    ) -> Pieces[torch.Tensor | None]:
        """Gradient w.r.t. the last layer's output `x` [C, H] of that w.r.t. the logits before the cap, None
        unless `needs_input`; adds that of the head's adapter, see `LMHead.add_gradient`. In pieces, the
        adapter's in the last."""
        dh_CH = (yield from self.head.backward_pieces(dlogits_CV)) if needs_input else None
        if gradient is not None:
            self.head.add_gradient(dlogits_CV, self.final_norm(x_CH), gradient, token_offset, dh_CH)
        return None if dh_CH is None else self.norm.backward(dh_CH, x_CH)

    def logits(self, h_SH: torch.Tensor, runs: Sequence[HeadRun] = ()) -> torch.Tensor:
        """[S, V] of normed hidden states [S, H], in their dtype (fp32 where they are capped); `runs` of them
        have an adapter on the head."""
        logits_SV = self.head.forward(h_SH, runs)
        return soft_cap_(logits_SV.float(), self.config.logit_cap) if self.config.logit_cap else logits_SV
