"""Buffers of a microbatch: what is kept where, aligned and apart from each other."""

from __future__ import annotations

import dataclasses

import torch

from coserve.layers.activations import LayerActivations
from coserve.models.config import ModelConfig
from coserve.training.activations import ALIGNMENT, MicrobatchActivations

CONFIG = ModelConfig("qwen3", 97, 48, 88, 3, 6, 2, 10, qk_norm=True)


def buffers(saved: MicrobatchActivations) -> list[torch.Tensor]:
    found = [saved.x_out_TH, saved.dh_TH, saved.dk_TND, saved.dv_TND]
    for layer in range(CONFIG.num_layers):
        held = saved.layer(layer)
        values = (getattr(held, field.name) for field in dataclasses.fields(held))
        found += [value for value in values if value is not None]
    return found


def test_buffers_lie_apart_inside_the_extent() -> None:
    shape = (CONFIG, 3, 7, torch.bfloat16, 1)
    size = MicrobatchActivations.nbytes(*shape)
    extent = torch.zeros(size + 64, dtype=torch.uint8)
    extent = extent[-extent.data_ptr() % ALIGNMENT :]
    found = buffers(MicrobatchActivations(extent, *shape))
    for number, buffer in enumerate(found, 1):
        assert buffer.data_ptr() % ALIGNMENT == 0
        assert buffer.is_contiguous()
        buffer.fill_(number)
    for number, buffer in enumerate(found, 1):
        assert bool((buffer == number).all())
    assert not extent[size:].any()


def test_layers_without_backward_keep_keys_and_values_only() -> None:
    shape = (CONFIG, 3, 7, torch.float32, 2)
    saved = MicrobatchActivations(
        torch.zeros(MicrobatchActivations.nbytes(*shape), dtype=torch.uint8), *shape
    )
    assert [saved.layer(layer).x_in_TH is not None for layer in range(3)] == [False, False, True]
    assert saved.layer(0).gate_up_T2I is None
    assert saved.layer(0).k_TND.shape == (7, 2, 10)
    full = LayerActivations.shapes(CONFIG, 7, torch.float32)
    assert dict((name, kind) for name, _, kind in full)["lse_TN"] is torch.float32


def test_raw_heads_are_kept_only_where_they_are_normed() -> None:
    plain = dataclasses.replace(CONFIG, qk_norm=False)
    names = {name for name, _, _ in LayerActivations.shapes(plain, 7, torch.float32)}
    assert "qk_raw_TND" not in names
    assert {"x_in_TH", "q_TND", "attn_out_TH", "lse_TN", "x_mid_TH", "gate_up_T2I"} <= names
