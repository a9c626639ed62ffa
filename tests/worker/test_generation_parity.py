"""Continuous batching of mixed adapters gives each request what transformers and PEFT give it alone."""

import pytest
import torch

from coserve.kernels.dispatch import native, use_backend
from coserve.models.loader import load_model
from tests.worker.generation import Generation

PROMPTS = {
    "a": ([5, 17, 3], None),
    "b": ([9, 9, 31, 44, 2, 7, 60, 11, 12, 13, 80], "all"),
    "c": ([1], "some"),
    "d": ([40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59], "some"),
    "e": ([9, 9, 31, 44, 2, 7, 60, 11, 12, 13, 80], None),
}


def generate_alone(models, adapter, prompt, tokens):
    model = models.hf(adapter)
    out = model.generate(
        input_ids=torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, pad_token_id=0
    )
    return out[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def expected(models):
    return {name: generate_alone(models, adapter, prompt, 8) for name, (prompt, adapter) in PROMPTS.items()}


def generation(models, **settings):
    engine = Generation(models.decoder, **settings)
    for name, path in models.adapters.items():
        engine.load(name, path)
    return engine


@pytest.mark.parametrize(
    "settings",
    [
        {"max_tokens": 64},
        {"max_tokens": 7},
        {"max_tokens": 3, "max_num_seqs": 2},
        {"max_tokens": 16, "blocks": 10},
        {"max_tokens": 16, "prefix_caching": True},
    ],
    ids=["whole", "chunked", "narrow", "preempting", "prefix-cache"],
)
def test_greedy_tokens_equal_generate(models, expected, settings):
    engine = generation(models, **settings)
    for name, (prompt, adapter) in PROMPTS.items():
        engine.add(name, prompt, adapter=adapter)
    assert engine.run() == expected
    if settings.get("blocks") == 10:
        assert engine.preemptions > 0
    if settings == {"max_tokens": 64}:
        assert engine.batched_adapters == 3


def test_adapters_change_the_output(expected):
    assert expected["b"] != expected["e"]


def test_a_cached_prefix_belongs_to_its_adapter(models, expected):
    engine = generation(models, max_tokens=32, prefix_caching=True)
    for name in ("e", "b"):
        prompt, adapter = PROMPTS[name]
        engine.add(name, prompt, adapter=adapter)
        engine.run()
        engine.add(f"{name} again", prompt, adapter=adapter)
        engine.run()
    outputs = engine.run()
    assert outputs["e"] == outputs["e again"] == expected["e"]
    assert outputs["b"] == outputs["b again"] == expected["b"]
    assert engine.requests["b again"].num_cached_tokens > 0


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_rows_do_not_depend_on_batch_mates(models, backend):
    """Tokens and log-probabilities: to the bit on the CPU kernels, within rounding on the references."""
    wanted = {"temperature": 0.8, "seed": 11, "logprobs": 3, "prompt_logprobs": 2}
    with use_backend(backend):
        alone = {}
        for name, (prompt, adapter) in PROMPTS.items():
            engine = generation(models, max_tokens=64)
            engine.add(name, prompt, adapter=adapter, **wanted)
            alone[name] = (engine.run()[name], engine.logprobs[name], engine.prompt_logprobs[name])
        engine = generation(models, max_tokens=5)
        for name, (prompt, adapter) in PROMPTS.items():
            engine.add(name, prompt, adapter=adapter, **wanted)
        outputs = engine.run()
    exact = backend == "auto" and native is not None
    for name in PROMPTS:
        tokens, sampled, prompt = alone[name]
        assert outputs[name] == tokens
        assert_same(engine.logprobs[name], sampled, exact)
        assert_same(engine.prompt_logprobs[name][1:], prompt[1:], exact)


def assert_same(got, want, exact):
    for one, other in zip(got, want, strict=True):
        if exact:
            assert one == other
        assert (one.token_id, one.rank) == (other.token_id, other.rank)
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert [token for token, _ in one.top] == [token for token, _ in other.top]


@pytest.mark.parametrize("max_tokens", [64, 5])
def test_prompt_logprobs_equal_transformers(models, max_tokens):
    prompt, adapter = PROMPTS["b"]
    engine = generation(models, max_tokens=max_tokens)
    engine.add("score", prompt, adapter=adapter, prompt_logprobs=2, max_tokens=0)
    engine.add("beside", PROMPTS["d"][0])
    assert engine.run()["score"] == []
    with torch.no_grad():
        logits = models.hf(adapter)(input_ids=torch.tensor([prompt])).logits[0].double()
    reference = torch.log_softmax(logits, dim=-1)
    got = engine.prompt_logprobs["score"]
    assert got[0] is None and len(got) == len(prompt)
    for position in range(1, len(prompt)):
        row, entry = reference[position - 1], got[position]
        assert entry.token_id == prompt[position]
        assert entry.logprob == pytest.approx(float(row[prompt[position]]), abs=1e-4)
        assert entry.rank == int((row > row[prompt[position]]).sum()) + 1
        assert [token for token, _ in entry.top] == row.topk(2).indices.tolist()
    assert engine.prompt_logprobs["beside"] is None


def test_an_adapter_without_rows_is_never_the_base(models):
    engine = generation(models)
    engine.add("x", [1, 2, 3], adapter="all")
    engine.slots.release = lambda key: False
    engine.pool.clear(engine.slots.rows("all"))
    with pytest.raises(KeyError):
        engine.step()


def test_forgotten_requests_leave_nothing(models):
    engine = generation(models, max_tokens=4)
    request = engine.add("x", list(range(12)), prompt_logprobs=1)
    engine.step()
    engine.runner.forget(request)
    assert engine.runner.take_prompt_logprobs(request) is None


def test_bf16_stays_near_fp32(models):
    prompt, adapter = PROMPTS["b"]
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        decoder = load_model(models.path, "cpu", dtype)
        engine = Generation(decoder, max_tokens=5)
        engine.load("all", models.adapters["all"])
        engine.add("x", prompt, adapter=adapter, prompt_logprobs=0)
        engine.add("beside", PROMPTS["d"][0])
        engine.run()
        found.append(torch.tensor([entry.logprob for entry in engine.prompt_logprobs["x"][1:]]))
    # bf16 has 8 bits: about 1 % of logits around 10 in this model
    assert (found[0] - found[1]).abs().max() < 0.5
    assert (found[0] - found[1]).abs().mean() < 0.15
