"""The decoder's forward: rows stand alone, whoever shares the batch (I1)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from coserve.kernels.dispatch import native
from coserve.kernels.lora import LoraSegments
from coserve.layers.batch import ForwardBatch, LoraBatch
from coserve.lora.adapter_pool import AdapterPool
from coserve.models.config import ModelConfig, RopeScaling
from coserve.models.decoder import Decoder
from coserve.models.loader import random_weights
from coserve.models.rope import make_rope_table
from coserve.training.activations import MicrobatchActivations
from coserve.training.job import LoraSpec
from coserve.training.microbatch import Microbatch
from coserve.training.trainable_adapter import TrainableAdapter
from tests.parity.harness import LLAMA3_ROPE, SMALL, Sequences
from tests.parity.training_harness import Trainer, fill_b, make_samples

CONFIG = ModelConfig("qwen3", 101, 48, 88, 2, 6, 2, 10, qk_norm=True, max_position_embeddings=256)


# Everything that a family may have beside Llama's parts.
ODD = replace(
    CONFIG,
    family="gemma2",
    layer_windows=(11, 0),
    post_norms=True,
    norm_offset=1.0,
    wide_norms=True,
    whole_qk_norm=True,
    scaled_embeddings=True,
    attention_cap=2.0,
    logit_cap=3.0,
    rotary_features=6,
)


@pytest.fixture(scope="module", params=[CONFIG, ODD], ids=["qwen3", "odd"])
def decoder(request: pytest.FixtureRequest) -> Decoder:
    return random_weights(request.param, 0, torch.float32)


def test_llama3_frequencies_equal_transformers() -> None:
    theirs_config = LlamaConfig(**{**SMALL, "head_dim": 32, "rope_parameters": LLAMA3_ROPE})
    frequency, _ = ROPE_INIT_FUNCTIONS["llama3"](theirs_config, "cpu")
    scaling = RopeScaling("llama3", 8.0, 1.0, 4.0, 32)
    config = ModelConfig("llama", 97, 48, 88, 1, 6, 2, 32, rope_theta=5000.0, rope_scaling=scaling)
    table = make_rope_table(config)
    angle = torch.arange(2048.0)[:, None] * frequency
    torch.testing.assert_close(table.cos, angle.cos(), rtol=0, atol=2e-4)
    torch.testing.assert_close(table.sin[:64], angle[:64].sin(), rtol=0, atol=1e-5)
    assert table.cos.dtype == torch.float32


def test_logits_do_not_depend_on_the_batch(decoder: Decoder) -> None:
    prompts = [[3, 4, 5, 6, 7], [9], list(range(40, 70))]
    together = Sequences(decoder, 3).run(dict(enumerate(prompts)))
    for row, prompt in enumerate(prompts):
        alone = Sequences(decoder, 1).run({0: prompt})[0]
        if native is not None:
            assert torch.equal(alone, together[row])
        torch.testing.assert_close(alone, together[row], rtol=0, atol=1e-5)


def test_prefill_in_pieces_and_decode_agree(decoder: Decoder) -> None:
    prompt = list(range(20, 60))
    whole = Sequences(decoder, 1).run({0: prompt})
    pieces = Sequences(decoder, 1)
    pieces.run({0: prompt[:17]})
    for token in prompt[17:-1]:
        pieces.run({0: [token]})
    last = pieces.run({0: prompt[-1:]})
    if native is not None:
        assert torch.equal(last, whole)
    torch.testing.assert_close(last, whole, rtol=0, atol=1e-5)


def test_training_beside_requests_changes_neither(decoder: Decoder) -> None:
    """Inference rows of two adapters' users and a training window in one batch."""
    adapter = TrainableAdapter(LoraSpec(r=3), decoder.config, seed=2)
    fill_b(adapter)
    trainer = Trainer.make(decoder, adapter)
    samples = make_samples((30, 20), 101)
    alone = Sequences(decoder, 2).run({0: [5, 6, 7], 1: [8]})
    microbatch, lonely = place(samples, decoder.config), place(samples, decoder.config)
    trainer.forward(lonely, 0)
    requests = Sequences(decoder, 2)
    batch = requests.batch({0: [5, 6, 7], 1: [8]})
    training = microbatch.num_tokens
    segments = LoraSegments(
        *(torch.tensor(v, dtype=torch.int32) for v in ([4], [4 + training], [0], trainer.rows))
    )
    ranks_LMS = adapter.ranks_LM[..., None].contiguous()
    mixed = ForwardBatch(
        torch.cat((batch.token_ids_T, microbatch.token_ids_T)),
        torch.cat((batch.positions_T, microbatch.positions_T)),
        batch.inference,
        [microbatch.window(4, 0, training)],
        LoraBatch(segments, ranks_LMS, trainer.pool),
    )
    x_TH = decoder.forward(mixed)
    logits = decoder.logits(decoder.final_norm(x_TH[[2, 3]]))
    torch.testing.assert_close(logits, alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(microbatch.saved.x_out_TH, lonely.saved.x_out_TH, rtol=0, atol=1e-5)
    if native is not None:
        assert torch.equal(logits, alone)
        assert torch.equal(microbatch.saved.x_out_TH, lonely.saved.x_out_TH)


def place(samples: list, config: ModelConfig) -> Microbatch:
    microbatch = Microbatch(samples)
    shape = (config, config.num_layers, microbatch.num_tokens, torch.float32, 0)
    extent = torch.empty(MicrobatchActivations.nbytes(*shape), dtype=torch.uint8)
    microbatch.activations = MicrobatchActivations(extent, *shape)
    return microbatch


def test_a_batch_without_adapted_rows_is_the_base(decoder: Decoder) -> None:
    segments = LoraSegments(*(torch.zeros(0, dtype=torch.int32) for _ in range(4)))
    pool = AdapterPool(decoder.config, 2, torch.float32)
    lora = LoraBatch(segments, torch.zeros(2, 7, 0, dtype=torch.int32), pool)
    assert lora.product(((0, 0), (1, 32)), 1) is None
    base = Sequences(decoder, 1).run({0: [3, 4]})
    assert torch.equal(Sequences(decoder, 1).run({0: [3, 4]}, lora), base)
