"""A job on families with odd blocks, beside requests: neither disturbs the other, and PEFT agrees."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch
from peft import PeftModel

from coserve.engine.local import LocalEngine
from coserve.training.job import JobSpec, LoraSpec
from tests.invariants import world
from tests.parity.harness import make_reference, save_reference

KINDS = ("gemma2", "gemma3", "phi3-longrope-partial", "olmo2")
PROMPTS = [[5, 9, 3, 40], list(range(3, 60)), [7] * 21]


def job(folder: Path, data: Path) -> JobSpec:
    spec = world.make_job(data, folder, n_epochs=1, learning_rate=2e-2)
    return msgspec.structs.replace(spec, lora=LoraSpec(r=4, lora_alpha=8.0))


def train(engine: LocalEngine, spec: JobSpec) -> dict[str, torch.Tensor]:
    world.submit(engine, spec)
    world.finish(engine, spec.job_id)
    return world.final_adapter(spec)


@pytest.mark.parametrize("kind", KINDS)
def test_a_job_beside_requests(kind: str, tmp_path: Path) -> None:
    reference = make_reference(kind, eos_token_id=0)
    model = save_reference(reference, tmp_path / "model")
    data = world.make_data(tmp_path / "data")
    calm = world.make_engine(model)
    answers = [calm.generate(prompt, world.GREEDY) for prompt in PROMPTS]
    adapter = train(calm, job(tmp_path / "calm", data))

    busy, spec = world.make_engine(model, max_num_batched_tokens=64), job(tmp_path / "busy", data)
    for number, prompt in enumerate(PROMPTS):
        busy.add(str(number), prompt, world.GREEDY)
    assert world.same_bits(train(busy, spec), adapter)
    assert [busy.tokens[str(number)] for number in range(len(PROMPTS))] == answers

    folder = max(path for path in Path(spec.checkpoint_dir).iterdir() if path.is_dir())
    peft = PeftModel.from_pretrained(reference, folder).eval()
    tuned = [busy.generate(prompt, world.GREEDY, world.ref(folder, model)) for prompt in PROMPTS]
    assert tuned != answers
    for prompt, answer in zip(PROMPTS, tuned, strict=True):
        text = torch.tensor([prompt])
        with torch.no_grad():
            for _ in range(world.GREEDY.max_tokens):
                text = torch.cat((text, peft(text).logits[:, -1:].argmax(-1)), -1)
        assert text[0, len(prompt) :].tolist() == answer
