"""Small random models in transformers and here, and plain drivers without scheduler or engine."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from coserve.layers.batch import ForwardBatch, InferenceRows
from coserve.models.config import ModelConfig
from coserve.models.decoder import Decoder

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MODELS: dict[str, tuple[type[PreTrainedModel], type, dict[str, object]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": False}),
    "llama3-tied-rope": (
        LlamaForCausalLM,
        LlamaConfig,
        {"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE},
    ),
    "llama-biases": (
        LlamaForCausalLM,
        LlamaConfig,
        {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu_pytorch_tanh"},
    ),
    "llama-linear-rope": (
        LlamaForCausalLM,
        LlamaConfig,
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    ),
    "mistral-mha-head10": (
        MistralForCausalLM,
        MistralConfig,
        {"head_dim": 10, "num_key_value_heads": 6, "sliding_window": None, "hidden_size": 50},
    ),
    "qwen2-tied": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3-mqa": (
        Qwen3ForCausalLM,
        Qwen3Config,
        {"head_dim": 16, "num_attention_heads": 5, "num_key_value_heads": 1, "tie_word_embeddings": False},
    ),
    "qwen3-biases-tied": (
        Qwen3ForCausalLM,
        Qwen3Config,
        {"head_dim": 12, "attention_bias": True, "tie_word_embeddings": True},
    ),
    "llama-yarn": (
        LlamaForCausalLM,
        LlamaConfig,
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            }
        },
    ),
    "mistral-window": (MistralForCausalLM, MistralConfig, {"sliding_window": 11}),
    "qwen2-window": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "qwen3-window": (
        Qwen3ForCausalLM,
        Qwen3Config,
        {
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": 12,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "gemma2": (
        Gemma2ForCausalLM,
        Gemma2Config,
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 20,
            "sliding_window": 10,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 0.7,
        },
    ),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 20,
            "sliding_window": 10,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            },
        },
    ),
    "phi3": (Phi3ForCausalLM, Phi3Config, {"sliding_window": 13}),
    "phi3-longrope-partial": (
        Phi3ForCausalLM,
        Phi3Config,
        {
            "hidden_size": 96,
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 512,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.75,
                "original_max_position_embeddings": 512,
                "short_factor": [1.0, 1.1, 1.2, 1.4, 1.7, 2.0],
                "long_factor": [1.0, 1.5, 3.0, 7.0, 20.0, 40.0],
            },
        },
    ),
    "olmo2": (Olmo2ForCausalLM, Olmo2Config, {}),
}
# One kind of each family, its hardest.
FAMILIES = (
    *("llama3-tied-rope", "mistral-window", "qwen2-window", "qwen3-biases-tied"),
    *("gemma2", "gemma3", "phi3-longrope-partial", "olmo2"),
)


def make_reference(kind: str, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A transformers model of random fp32 weights, larger than its initialisation so that all parts tell."""
    model_class, config_class, own = MODELS[kind]
    torch.manual_seed(seed)
    model = model_class(config_class(**{**SMALL, **own, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                offset = 0 if kind.startswith("gemma") else 1
                parameter.copy_(offset + 0.2 * torch.randn_like(parameter))
            elif name.endswith("bias"):
                parameter.copy_(0.2 * torch.randn_like(parameter))
            elif "embed" in name:
                # Gemma multiplies by sqrt(H): a larger table, tied, would only repeat the last token.
                size = 0.05 if kind.startswith("gemma") else 0.5
                parameter.copy_(torch.randn_like(parameter) * size)
            else:
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[1] ** -0.5)
    return model


def save_reference(model: PreTrainedModel, folder: Path, max_shard_size: str = "1GB") -> Path:
    """As a Hugging Face directory."""
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


class TestKV:
    """A paged cache whose blocks lie scattered; block 0 stays unused."""

    __test__ = False

    def __init__(self, config: ModelConfig, blocks: int, block_size: int, dtype: torch.dtype) -> None:
        self.block_size = block_size
        shape = (blocks, config.num_layers, 2, block_size, config.num_kv_heads, config.head_dim)
        self.slabs = torch.full(shape, float("nan"), dtype=dtype)

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.slabs[:, layer, 0], self.slabs[:, layer, 1]


class Sequences:
    """Runs ragged batches of sequences: each call gives some of them new tokens and returns the logits of
    every sequence's last one."""

    def __init__(self, decoder: Decoder, num_sequences: int, block_size: int = 4, max_len: int = 64) -> None:
        per_sequence = -(-max_len // block_size)
        self.decoder = decoder
        self.kv = TestKV(decoder.config, 1 + num_sequences * per_sequence, block_size, decoder.dtype)
        order = torch.randperm(num_sequences * per_sequence, generator=torch.Generator().manual_seed(1)) + 1
        self.tables = order.view(num_sequences, per_sequence).to(torch.int32)
        self.lengths = [0] * num_sequences

    def batch(self, new_tokens: dict[int, list[int]], lora: object = None) -> ForwardBatch:
        size = self.kv.block_size
        ids, positions, slots, starts, contexts = [], [], [], [0], []
        for s, tokens in new_tokens.items():
            for token in tokens:
                position = self.lengths[s]
                slots.append(int(self.tables[s, position // size]) * size + position % size)
                ids.append(token)
                positions.append(position)
                self.lengths[s] += 1
            starts.append(len(ids))
            contexts.append(self.lengths[s])
        rows = InferenceRows(
            len(ids),
            torch.tensor(slots),
            self.tables[list(new_tokens)],
            torch.tensor(starts, dtype=torch.int32),
            torch.tensor(contexts, dtype=torch.int32),
            self.kv,
        )
        return ForwardBatch(torch.tensor(ids), torch.tensor(positions), rows, [], lora)

    @torch.inference_mode()
    def run(self, new_tokens: dict[int, list[int]], lora: object = None) -> torch.Tensor:
        batch = self.batch(new_tokens, lora)
        x_TH = self.decoder.forward(batch)
        last = batch.inference.query_start_S1[1:].long() - 1
        return self.decoder.logits(self.decoder.final_norm(x_TH[last])).float()
