"""A block of odd families in the interpreter, with and without adapters, beside the CPU's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from coserve.kernels.dispatch import set_batch_invariant, use_backend
from coserve.kernels.lora import LoraSegments
from coserve.kernels.triton import lora_fused
from coserve.layers.batch import LoraBatch
from coserve.lora.adapter_pool import AdapterPool
from coserve.models.config import ModelConfig
from coserve.models.decoder import Decoder
from coserve.models.loader import random_weights
from tests.kernels.oracle import error, ints
from tests.parity.harness import Sequences
from tests.triton.launches import Noted

PLAIN = ModelConfig("llama", 53, 32, 40, 1, 4, 2, 8, max_position_embeddings=64)
POSTS = replace(PLAIN, post_norms=True, wide_norms=True)
RANK = 3
# Fused norms and activations of one layer's pass.
FAMILIES = {
    "llama": (PLAIN, 2, 1),
    "phi3": (replace(PLAIN, family="phi3", fused=True), 2, 1),
    "gemma2": (replace(POSTS, family="gemma2", norm_offset=1.0, hidden_act="gelu_pytorch_tanh"), 2, 1),
    "olmo2": (replace(POSTS, family="olmo2", pre_norms=False, qk_norm=True, whole_qk_norm=True), 0, 1),
}


def adapted(decoder: Decoder) -> AdapterPool:
    """A pool with an adapter of rank 3 on every module in its rows 1 to 3."""
    config, generator = decoder.config, torch.Generator().manual_seed(2)
    pool = AdapterPool(config, RANK + 1, decoder.dtype)
    rows = list(range(1, RANK + 1))
    pool.place(rows, torch.full((config.num_layers, pool.num_modules), RANK))
    for module, name in enumerate(config.linear_modules):
        outputs, inputs = config.module_shape(name)
        a, b = (torch.randn(RANK, size, generator=generator) / 4 for size in (inputs, outputs))
        pool.write_module(rows, module, 0, a, b)
    return pool


def logits(decoder: Decoder, pool: AdapterPool | None) -> torch.Tensor:
    """Of a prompt with the adapter beside one without, and of a token decoded after each."""

    def lora(tokens: int) -> LoraBatch | None:
        if pool is None:
            return None
        segments = LoraSegments(ints(0), ints(tokens), ints(0), ints(1, 2, 3))
        return LoraBatch(segments, pool.ranks([1, 2, 3])[..., None].contiguous(), pool)

    sequences = Sequences(decoder, 2)
    first = sequences.run({0: list(range(5, 14)), 1: [7, 3, 30]}, lora(9))
    return torch.cat((first, sequences.run({0: [20], 1: [21]}, lora(1))))


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_the_cpu_ones(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, norms, activations = FAMILIES[name]
    fused = Noted(lora_fused.fused_shrink_kernel, "NORMS")
    monkeypatch.setattr(lora_fused, "fused_shrink_kernel", fused)
    decoder = random_weights(config, 0, torch.float32)
    pool = adapted(decoder)
    with use_backend("auto"):
        wants = [logits(decoder, each) for each in (None, pool)]
    assert error(logits(decoder, None), wants[0].double()) < 1e-5 and not fused.launches
    assert error(logits(decoder, pool), wants[1].double()) < 1e-5
    assert [fused.launches.count(kind) for kind in (True, False)] == [2 * norms, 2 * activations]
    assert error(wants[1], wants[0].double()) > 1e-2


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_deterministic_rows_without_adapter_have_their_bits_beside_one(name: str) -> None:
    decoder = random_weights(FAMILIES[name][0], 0, torch.float32)
    set_batch_invariant(True)
    try:
        base, beside = logits(decoder, None), logits(decoder, adapted(decoder))
    finally:
        set_batch_invariant(False)
    assert torch.equal(base[1::2], beside[1::2]) and not torch.equal(base[0], beside[0])
