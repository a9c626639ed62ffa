"""Sliding windows, caps and odd norms under the scheduler: chunks, preemption and cached prefixes."""

from __future__ import annotations

import pytest
import torch

from coserve.models.loader import load_model
from tests.parity.harness import make_reference, save_reference
from tests.worker.generation import Generation

SETTINGS = {
    "whole": {"max_tokens": 96},
    "chunked": {"max_tokens": 7},
    "preempting": {"max_tokens": 16, "blocks": 16},
    "prefix-cache": {"max_tokens": 24, "prefix_caching": True},
}
SHARED = list(range(20, 52))
PROMPTS = {
    "a": [5, 17, 3],
    "b": [*SHARED, 60, 61],
    "c": [*SHARED, 70],
    "d": [9, 9, 31, 44, 2, 7, 60, 11, 12, 13],
}


@pytest.fixture(scope="module", params=["gemma2", "gemma3", "phi3-longrope-partial", "olmo2", "qwen3-window"])
def family(request, tmp_path_factory):
    reference = make_reference(request.param, eos_token_id=None)
    folder = save_reference(reference, tmp_path_factory.mktemp(request.param))
    texts = {}
    for name, prompt in PROMPTS.items():
        text = torch.tensor([prompt])
        with torch.no_grad():
            for _ in range(14):
                text = torch.cat((text, reference(text).logits[:, -1:].argmax(-1)), -1)
        texts[name] = text[0, len(prompt) :].tolist()
    return load_model(folder, "cpu", torch.float32), texts


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_greedy_tokens_equal_transformers(family, settings) -> None:
    decoder, expected = family
    engine = Generation(decoder, **settings)
    for name, prompt in PROMPTS.items():
        engine.add(name, prompt, max_tokens=14)
    assert engine.run() == expected
    assert engine.preemptions > 0 or "blocks" not in settings
