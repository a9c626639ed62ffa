"""A tiny Llama and adapters that PEFT itself has saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers

from coserve.models.config import ModelConfig

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(min(2, torch.get_num_threads()))
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        pad_token_id=0,
    )
    path = tmp_path_factory.mktemp("base") / "model"
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def config(base_dir: Path) -> ModelConfig:
    return ModelConfig.from_dir(base_dir)


def load_base(base_dir: Path) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)


@pytest.fixture
def save_adapter(base_dir: Path, tmp_path: Path) -> Callable[..., Path]:
    """save_adapter(dtype=..., **LoraConfig) -> directory, with random A and B."""
    made: list[Path] = []

    def save(dtype: torch.dtype = torch.float32, **config: object) -> Path:
        torch.manual_seed(len(made) + 1)
        settings = {"r": 4, "lora_alpha": 8, "target_modules": ALL, "task_type": "CAUSAL_LM", **config}
        model = peft.get_peft_model(load_base(base_dir), peft.LoraConfig(**settings))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.2)
                parameter.data = parameter.data.to(dtype)
        path = tmp_path / f"adapter{len(made)}"
        model.save_pretrained(path)
        made.append(path)
        return path

    return save
