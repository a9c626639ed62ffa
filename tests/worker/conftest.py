"""A tiny random Llama in transformers' and in our form, with two PEFT adapters of different ranks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import peft
import pytest
import torch
import transformers

from coserve.models.decoder import Decoder
from coserve.models.loader import load_model
from tests.worker.generation import quiet_torch


@dataclass
class Models:
    """`path` is the model directory; `adapters` maps names to PEFT directories."""

    path: Path
    adapters: dict[str, Path]
    decoder: Decoder

    def hf(self, adapter: str | None = None) -> torch.nn.Module:
        """transformers' (and PEFT's) own model, in fp32."""
        model = transformers.AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32)
        return (
            peft.PeftModel.from_pretrained(model, self.adapters[adapter]).eval() if adapter else model.eval()
        )


def make_adapter(base: Path, out: Path, seed: int, **config: object) -> Path:
    """A PEFT adapter with random A and B, big enough to change greedy tokens."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **config))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(out)
    return out


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    quiet_torch()
    root = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        eos_token_id=None,
        bos_token_id=None,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(root / "base")
    everything = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapters = {
        "all": make_adapter(root / "base", root / "all", 1, r=4, lora_alpha=8, target_modules=everything),
        "some": make_adapter(
            root / "base",
            root / "some",
            2,
            r=3,
            lora_alpha=6,
            use_rslora=True,
            target_modules=["q_proj", "down_proj"],
            rank_pattern={"layers.1.mlp.down_proj": 5},
            alpha_pattern={"q_proj": 9},
        ),
    }
    return Models(root / "base", adapters, load_model(root / "base", "cpu", torch.float32))
