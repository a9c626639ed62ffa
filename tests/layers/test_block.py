"""A decoder block against an independent float64 block under autograd, bare of adapters."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import gelu, scaled_dot_product_attention, silu

from coserve.layers.batch import BackwardWindow, ForwardBatch, TrainingWindow
from coserve.layers.pieces import whole
from coserve.models.config import ModelConfig
from coserve.models.decoder import Decoder
from coserve.models.loader import build_decoder, tensor_shapes
from coserve.training.activations import MicrobatchActivations

LENGTHS = (37, 5, 60)
TOKENS = sum(LENGTHS)


def make(act: str, qk_norm: bool) -> Decoder:
    config = ModelConfig(
        "qwen3", 11, 24, 40, 1, 4, 2, 6, qk_norm=qk_norm, hidden_act=act, attention_bias=True
    )
    generator = torch.Generator().manual_seed(3)

    def fetch(name: str) -> torch.Tensor:
        shape = tensor_shapes(config)[name]
        values = torch.randn(shape, generator=generator)
        return 1 + 0.2 * values if name.endswith("norm.weight") else values * shape[-1] ** -0.5

    return build_decoder(config, fetch, "cpu", torch.float32)


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.double()


def block(decoder: Decoder, x_TH: torch.Tensor) -> torch.Tensor:
    """The same block sample by sample with torch's own attention, in float64."""
    config, layer = decoder.config, decoder.layers[0]
    attention, mlp = layer.attention, layer.mlp
    outputs = []
    for x in x_TH.split(LENGTHS):
        normed = norm(x, layer.attn_norm.weight, config.rms_norm_eps)
        qkv = normed @ attention.qkv.packed.unpacked().double().t() + attention.qkv.packed.bias.double()
        q, k, v = qkv.view(len(x), -1, config.head_dim).split((4, 2, 2), 1)
        if attention.q_norm is not None and attention.k_norm is not None:
            q = norm(q, attention.q_norm.weight, config.rms_norm_eps)
            k = norm(k, attention.k_norm.weight, config.rms_norm_eps)
        cos, sin = (t[: len(x), None].double() for t in (attention.rope.cos, attention.rope.sin))
        q, k = (
            torch.cat((a * cos - b * sin, b * cos + a * sin), -1) for a, b in (t.chunk(2, -1) for t in (q, k))
        )
        heads = [t.transpose(0, 1)[None] for t in (q, k, v)]
        o = scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)[0].transpose(0, 1)
        x = x + o.reshape(len(x), -1) @ attention.out.packed.unpacked().double().t()
        normed = norm(x, layer.mlp_norm.weight, config.rms_norm_eps)
        gate, up = (normed @ mlp.gate_up.packed.unpacked().double().t()).chunk(2, -1)
        gate = silu(gate) if config.hidden_act == "silu" else gelu(gate, approximate="tanh")
        outputs.append(x + (gate * up) @ mlp.down.packed.unpacked().double().t())
    return torch.cat(outputs)


@pytest.mark.parametrize("act,qk_norm", [("silu", False), ("gelu_tanh", True)])
@pytest.mark.parametrize("width", [TOKENS, 64, 13])
def test_forward_and_backward(act: str, qk_norm: bool, width: int) -> None:
    decoder = make(act, qk_norm)
    config = decoder.config
    generator = torch.Generator().manual_seed(4)
    x_TH = torch.randn(TOKENS, 24, generator=generator)
    dy_TH = torch.randn(TOKENS, 24, generator=generator)
    exact = x_TH.double().requires_grad_()
    expected = block(decoder, exact)
    expected.backward(dy_TH.double())

    shape = (config, 1, TOKENS, torch.float32, 0)
    extent = torch.full((MicrobatchActivations.nbytes(*shape),), 255, dtype=torch.uint8)
    saved = MicrobatchActivations(extent, *shape)
    starts = torch.tensor([sum(LENGTHS[:i]) for i, n in enumerate(LENGTHS) for _ in range(n)])
    positions = torch.arange(TOKENS) - starts
    starts = starts.to(torch.int32)
    bounds = [(s, min(s + width, TOKENS)) for s in range(0, TOKENS, width)]
    with torch.no_grad():
        for start, end in bounds:
            window = TrainingWindow(0, end - start, start, starts[start:end], saved, saved.x_out_TH)
            batch = ForwardBatch(positions[start:end], positions[start:end], None, [window], None)
            decoder.forward_layers(x_TH[start:end], batch)
        torch.testing.assert_close(saved.x_out_TH.double(), expected.detach(), rtol=0, atol=1e-5)
        dx_TH = torch.empty_like(x_TH)
        saved.dk_TND.zero_()
        saved.dv_TND.zero_()
        for start, end in bounds[::-1]:
            work = BackwardWindow(
                start, end, starts, positions, saved.layer(0), saved.dk_TND, saved.dv_TND, {}
            )
            dx_TH[start:end] = whole(decoder.layers[0].backward(dy_TH[start:end], work))
    assert exact.grad is not None
    torch.testing.assert_close(dx_TH.double(), exact.grad, rtol=0, atol=2e-5)
