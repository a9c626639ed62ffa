"""Adapters as PEFT makes them, on the modules of every family: served like PEFT, and exported for PEFT."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from coserve.errors import InvalidRequest
from coserve.kernels.lora import LoraSegments
from coserve.layers.batch import LoraBatch
from coserve.lora.adapter import load_adapter
from coserve.lora.adapter_pool import AdapterPool
from coserve.lora.peft_files import write_adapter
from coserve.models.decoder import Decoder
from coserve.models.loader import load_model
from coserve.training.job import LoraSpec
from coserve.training.lora_settings import resolve_lora
from coserve.training.trainable_adapter import TrainableAdapter
from tests.parity.harness import FAMILIES, Sequences, make_reference, save_reference
from tests.parity.training_harness import fill_b

PROMPT = list(range(3, 40))


def served(decoder: Decoder, folder: Path) -> torch.Tensor:
    """Logits of the prompt's last token and of one decoded after it, with the adapter in `folder`."""
    adapter = load_adapter(folder, decoder.config)
    pool = AdapterPool(decoder.config, adapter.rank + 2, decoder.dtype)
    rows = list(range(1, adapter.rank + 1))
    pool.write(rows, adapter)
    ranks_LMS = pool.ranks(rows)[..., None].contiguous()

    def batch(tokens: int) -> LoraBatch:
        values = [0], [tokens], [0], rows
        return LoraBatch(LoraSegments(*(torch.tensor(v, dtype=torch.int32) for v in values)), ranks_LMS, pool)

    sequence = Sequences(decoder, 1)
    first = sequence.run({0: PROMPT}, batch(len(PROMPT)))
    return torch.cat((first, sequence.run({0: [50]}, batch(1))))


def expected(model: PeftModel) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([[*PROMPT, 50]])).logits[0, -2:]


@pytest.mark.parametrize("kind", FAMILIES)
def test_peft_adapters_are_served_as_peft_computes_them(kind: str, tmp_path: Path) -> None:
    reference = make_reference(kind)
    decoder = load_model(save_reference(reference, tmp_path / "base"), "cpu", torch.float32)
    names = list(decoder.config.linear_modules)
    settings = {"r": 5, "target_modules": names, "rank_pattern": {names[0]: 2}, "init_lora_weights": False}
    torch.manual_seed(3)
    model = get_peft_model(reference, LoraConfig(**settings)).eval()
    model.save_pretrained(tmp_path / "adapter")
    logits = served(decoder, tmp_path / "adapter")
    torch.testing.assert_close(logits, expected(model), rtol=0, atol=1e-4)
    with model.disable_adapter():
        assert (logits - expected(model)).abs().max() > 0.1


@pytest.mark.parametrize("kind", FAMILIES)
def test_exports_are_loaded_by_peft(kind: str, tmp_path: Path) -> None:
    reference = make_reference(kind)
    decoder = load_model(save_reference(reference, tmp_path / "base"), "cpu", torch.float32)
    adapter = TrainableAdapter(LoraSpec(r=6), decoder.config, seed=2)
    fill_b(adapter, 0.1)
    write_adapter(tmp_path / "adapter", adapter.tensors(), adapter.config)
    model = PeftModel.from_pretrained(reference, tmp_path / "adapter").eval()
    torch.testing.assert_close(served(decoder, tmp_path / "adapter"), expected(model), rtol=0, atol=1e-4)


def test_modules_of_another_family_are_refused(tmp_path: Path) -> None:
    llama, phi = make_reference("llama"), make_reference("phi3")
    config = load_model(save_reference(phi, tmp_path / "base"), "cpu", torch.float32).config
    with pytest.raises(InvalidRequest, match="unknown target module 'q_proj'"):
        resolve_lora(LoraSpec(target_modules=("q_proj",)), config)
    get_peft_model(llama, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(InvalidRequest, match="unknown target module 'q_proj'"):
        load_adapter(tmp_path / "adapter", config)
