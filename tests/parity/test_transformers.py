"""Logits and greedy tokens against transformers on small random models of every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from coserve.models.loader import load_model
from tests.parity.harness import MODELS, Sequences, make_reference, save_reference


@pytest.mark.parametrize("kind", MODELS)
def test_logits_and_greedy_tokens_equal(kind: str, tmp_path: Path) -> None:
    reference = make_reference(kind)
    decoder = load_model(save_reference(reference, tmp_path), "cpu", torch.float32)
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(3, 97, (n,), generator=generator).tolist() for n in (1, 7, 33)]
    ours = Sequences(decoder, len(prompts))
    # The last prompt comes in two pieces, so that prefill over an older context is covered.
    ours.run({2: prompts[2][:10]})
    logits = ours.run({0: prompts[0], 1: prompts[1], 2: prompts[2][10:]})
    texts = [list(prompt) for prompt in prompts]
    for _ in range(12):
        next_tokens = logits.argmax(-1).tolist()
        for row, text in enumerate(texts):
            with torch.no_grad():
                expected = reference(torch.tensor([text])).logits[0, -1]
            torch.testing.assert_close(logits[row], expected, rtol=0, atol=1e-4)
            assert next_tokens[row] == int(expected.argmax())
            text.append(next_tokens[row])
        logits = ours.run({row: [token] for row, token in enumerate(next_tokens)})


def test_longrope_of_a_context_over_the_original(tmp_path: Path) -> None:
    _, _, own = MODELS["phi3-longrope-partial"]
    rope = {**own["rope_parameters"], "original_max_position_embeddings": 20}  # type: ignore[dict-item]
    reference = make_reference(
        "phi3-longrope-partial", rope_parameters=rope, original_max_position_embeddings=20
    )
    folder = save_reference(reference, tmp_path)
    long, short = list(range(3, 50)), list(range(3, 23))
    with torch.no_grad():
        wants = [reference(torch.tensor([text])).logits[0, -1:] for text in (long, short)]
    decoder = load_model(folder, "cpu", torch.float32)
    torch.testing.assert_close(Sequences(decoder, 1).run({0: long}), wants[0], rtol=0, atol=1e-4)
    decoder = load_model(folder, "cpu", torch.float32, max_model_len=20)
    torch.testing.assert_close(Sequences(decoder, 1).run({0: short}), wants[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["gemma2", "gemma3", "olmo2"])
def test_bfloat16_logits_are_as_near_as_those_of_transformers(kind: str, tmp_path: Path) -> None:
    reference = make_reference(kind).to(torch.bfloat16)
    decoder = load_model(save_reference(reference, tmp_path), "cpu", torch.bfloat16)
    prompts = torch.randint(3, 97, (16, 40), generator=torch.Generator().manual_seed(1))
    ours = Sequences(decoder, len(prompts)).run(dict(enumerate(prompts.tolist())))
    with torch.no_grad():
        theirs = reference(prompts).logits[:, -1].double()
        exact = reference.double()(prompts).logits[:, -1]
    assert (ours - exact).norm() <= 1.1 * (theirs - exact).norm()


def test_bfloat16_logits_are_near_float32(tmp_path: Path) -> None:
    reference = make_reference("qwen3-mqa", hidden_size=64, intermediate_size=160)
    folder = save_reference(reference, tmp_path)
    tokens = list(range(3, 60))
    exact = Sequences(load_model(folder, "cpu", torch.float32), 1).run({0: tokens})
    ours = Sequences(load_model(folder, "cpu", torch.bfloat16), 1).run({0: tokens})
    with torch.no_grad():
        theirs = reference.to(torch.bfloat16)(torch.tensor([tokens])).logits[0, -1:].float()
    assert (ours - exact).norm() <= 1.5 * (theirs - exact).norm()
    assert (ours - exact).norm() <= 0.05 * exact.norm()
