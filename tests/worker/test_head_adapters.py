"""Adapters on lm_head: PEFT's own files, served beside others, with tied and with separate tables."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from coserve.errors import InvalidRequest
from coserve.kernels.linear import PackedLinear
from coserve.lora.adapter import load_adapter
from coserve.models.loader import load_model
from tests.worker.conftest import Models, make_adapter
from tests.worker.generation import Generation, quiet_torch

HEAD = dict(
    target_modules=["q_proj", "lm_head"], r=3, rank_pattern={"lm_head": 5}, alpha_pattern={"lm_head": 3}
)
PROMPTS = {
    "base": ([5, 17, 3], None),
    "head": ([9, 9, 31, 44, 2, 7, 60], "head"),
    "only": ([1, 2], "only"),
    "blocks": ([40, 41, 42, 43], "blocks"),
    "same as head": ([9, 9, 31, 44, 2, 7, 60], None),
}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Models:
    quiet_torch()
    root = tmp_path_factory.mktemp("tied" if request.param else "untied")
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        tie_word_embeddings=request.param,
        eos_token_id=None,
        bos_token_id=None,
    )
    base = root / "base"
    transformers.Qwen2ForCausalLM(config).save_pretrained(base)
    adapters = {
        "head": make_adapter(base, root / "head", 1, **HEAD),
        "only": make_adapter(base, root / "only", 2, r=4, target_modules=["lm_head"], use_rslora=True),
        "blocks": make_adapter(base, root / "blocks", 3, r=2, target_modules="all-linear"),
    }
    return Models(base, adapters, load_model(base, "cpu", torch.float32))


def served(models: Models, **settings: object) -> Generation:
    engine = Generation(models.decoder, **settings)
    for name, path in models.adapters.items():
        engine.load(name, path)
    return engine


def test_each_row_gets_the_head_of_its_adapter(models: Models) -> None:
    """transformers' generate on PEFT's model; peft saves the base's head beside an adapter on it."""
    assert "base_model.model.lm_head.base_layer.weight" in load_file(
        models.adapters["head"] / "adapter_model.safetensors"
    )
    table = models.decoder.head.unpacked()
    engine = served(models, max_tokens=16)
    for name, (prompt, adapter) in PROMPTS.items():
        engine.add(name, prompt, adapter=adapter, prompt_logprobs=1, logprobs=1)
    outputs = engine.run()
    assert outputs["head"] != outputs["same as head"]
    for name, (prompt, adapter) in PROMPTS.items():
        model = models.hf(adapter)
        with torch.no_grad():
            ids = torch.tensor([prompt + outputs[name]])
            logprobs = model(input_ids=ids).logits[0].log_softmax(-1)
        assert logprobs[len(prompt) - 1 : -1].argmax(-1).tolist() == outputs[name]
        theirs = logprobs[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist()
        scored = [entry.logprob for entry in engine.prompt_logprobs[name][1:]]
        sampled = [entry.logprob for entry in engine.logprobs[name]]
        assert scored + sampled == pytest.approx(theirs, abs=2e-4)
    assert torch.equal(models.decoder.head.unpacked(), table)


def test_memory_is_that_of_the_heads_there_are(models: Models) -> None:
    engine = Generation(models.decoder)
    empty = engine.pool.nbytes
    engine.load("blocks", models.adapters["blocks"])
    assert engine.pool.nbytes == empty
    engine.load("head", models.adapters["head"])
    assert engine.pool.nbytes == empty + 4 * 5 * (96 + 32)
    rows = engine.slots.rows("head")
    engine.pool.free_heads(rows)
    assert engine.pool.nbytes == empty and engine.pool.head(rows) is None


def test_the_head_of_another_base_is_refused(models: Models, tmp_path: Path) -> None:
    folder = make_adapter(models.path, tmp_path / "other", 1, **HEAD)
    own = models.decoder.head
    assert load_adapter(folder, models.decoder.config, base_head=own)
    assert load_adapter(folder, models.decoder.config, base_head=PackedLinear(own.unpacked().bfloat16()))
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.lm_head.base_layer.weight"][3, 4] += 0.5
    save_file(tensors, file)
    with pytest.raises(InvalidRequest, match="not the head of this base"):
        load_adapter(folder, models.decoder.config, base_head=own)
    tensors["base_model.model.lm_head.base_layer.weight"] = torch.zeros(95, 32)
    save_file(tensors, file)
    with pytest.raises(InvalidRequest, match=r"lm_head\.base_layer\.weight has shape"):
        load_adapter(folder, models.decoder.config)


def test_embedding_adapters_are_refused_by_name(models: Models, tmp_path: Path) -> None:
    """peft#2018, peft#2092: an adapter that would change embed_tokens is never taken for one on the head."""
    base = transformers.AutoModelForCausalLM.from_pretrained(models.path)
    config = peft.LoraConfig(target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM")
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "embedding")
    with pytest.raises(InvalidRequest, match="embedding adapters are not supported"):
        load_adapter(tmp_path / "embedding", models.decoder.config)
