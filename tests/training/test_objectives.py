"""Objectives: losses and gradients against autograd on PEFT's model in float64, and what they rest on."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy, logsigmoid

from coserve.core.training_sequence import TrainingSequence
from coserve.errors import InvalidRequest
from coserve.kernels.dispatch import native
from coserve.lora.adapter_pool import AdapterPool
from coserve.models.loader import load_model
from coserve.training.batch_run import BatchRun, Trainee
from coserve.training.job import LoraSpec, TrainingSpec
from coserve.training.microbatch import Microbatch
from coserve.training.objectives import (
    CHUNK,
    CrossEntropy,
    DirectPreference,
    DynamicFineTuning,
    LossSums,
    Objective,
    WithKL,
    make_objective,
)
from coserve.training.trainable_adapter import TrainableAdapter
from coserve.worker.kv_tensors import KVTensors
from tests.parity.harness import make_reference, save_reference
from tests.parity.training_harness import (
    drive,
    fill_b,
    gradient_tensors,
    make_peft,
    make_samples,
    peft_gradients,
)

VOCAB = 97
ROWS = {"job": [0, 1, 2, 3], "job/start": [7, 6, 5, 4]}
BETA = 0.3
Loss = Callable[[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]], torch.Tensor]


class Setting:
    """A model, an adapter away from its start, and the start of another in the reference's rows."""

    def __init__(self, kind: str, folder: Path, dtype: torch.dtype = torch.float32, **sizes: int) -> None:
        self.reference = make_reference(kind, **sizes).to(dtype)
        self.decoder = load_model(save_reference(self.reference, folder), "cpu", dtype)
        self.adapter = TrainableAdapter(LoraSpec(r=4), self.decoder.config, seed=2)
        fill_b(self.adapter, 0.1)
        self.pool = AdapterPool(self.decoder.config, 8, dtype)
        self.kv = KVTensors(self.decoder.config, 1000, 4, dtype)
        self.adapter.place(self.pool, ROWS["job"])
        self.adapter.place(self.pool, ROWS["job/start"])

    def run(self, objective: Objective, microbatches: list, window=64, start=None, before=None, call=256):
        """Gradients and sums of the whole batch."""
        self.adapter.zero_gradients()
        run = BatchRun(
            self.decoder, objective, microbatches, name="s", job_id="job", adapter="job", reference=start,
            pool=self.pool, rows=ROWS, trainee=Trainee(self.adapter, self.pool, ROWS["job"]), kv=self.kv,
        )  # fmt: skip
        drive(run, self.decoder, self.pool, ROWS, self.kv, window, before, call)
        self.adapter.finish_gradients()
        sums = LossSums.total(run.sums())
        return sums, gradient_tensors(self.adapter)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting("qwen2-tied", tmp_path_factory.mktemp("model"))


def oracle(setting: Setting, samples: list, loss: Loss, dtype: torch.dtype):
    """`loss(logits, targets, base logits)` of each sample's trained positions, and its gradients. In bf16 the
    adapter stays fp32 and the model runs under autocast."""
    low = dtype == torch.bfloat16
    model = make_peft(setting.reference, setting.adapter, dtype, torch.float32 if low else dtype)
    logits, targets, bases = [], [], []
    for ids, labels, *_ in samples:
        kept = torch.tensor(labels[1:]) != -100
        targets.append(torch.tensor(labels[1:])[kept])
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            logits.append(model(torch.tensor([ids])).logits[0, :-1][kept])
            with torch.no_grad(), model.disable_adapter():
                bases.append(model(torch.tensor([ids])).logits[0, :-1][kept])
    if low:
        logits, bases = [z.float() for z in logits], [z.float() for z in bases]
    value = loss(logits, targets, bases)
    value.backward()
    return value.item(), peft_gradients(model)


def check(setting: Setting, samples: list, objective: Objective, loss: Loss, split: int, **more) -> LossSums:
    """Ours against float64, no further off than fp32 autograd allows (I2)."""
    exact_loss, exact = oracle(setting, samples, loss, torch.float64)
    _, theirs = oracle(setting, samples, loss, torch.float32)
    sums, ours = setting.run(objective, [part for part in (samples[:split], samples[split:]) if part], **more)
    assert sums.loss / sums.count == pytest.approx(exact_loss, rel=2e-6, abs=1e-7)
    for key, gradient in exact.items():
        bound = max(1e-5 * float(gradient.abs().max()), 2 * float((theirs[key] - gradient).abs().max()))
        assert gradient.abs().max() > 0
        assert (ours[key] - gradient).abs().max() <= bound, key
    return sums


def logps(logits: list[torch.Tensor], targets: list[torch.Tensor]) -> list[torch.Tensor]:
    return [z.log_softmax(-1).gather(1, t[:, None]).squeeze(1) for z, t in zip(logits, targets, strict=True)]


def smoothed(logits, targets, bases):
    """torch's own label smoothing, which is that of transformers' LabelSmoother."""
    return cross_entropy(torch.cat(logits), torch.cat(targets), label_smoothing=0.2)


def dft(logits, targets, bases):
    """TRL's dft_loss."""
    own = torch.cat(logps(logits, targets))
    return (-own.exp().detach() * own).mean()


def with_kl(logits, targets, bases):
    """Supervised plus TRL's k3 estimate, as its GRPO adds it."""
    own, base = torch.cat(logps(logits, targets)), torch.cat(logps(bases, targets))
    return (-own + 0.4 * (torch.exp(base - own) - (base - own) - 1)).mean()


def dpo(logits, targets, bases):
    """TRL's DPO, loss_type sigmoid."""
    own = torch.stack([x.sum() for x in logps(logits, targets)])
    base = torch.stack([x.sum() for x in logps(bases, targets)])
    ratios = own - base
    return -logsigmoid(BETA * (ratios[::2] - ratios[1::2])).mean()


OBJECTIVES = {
    "label smoothing": (CrossEntropy(0.2), smoothed),
    "dft": (DynamicFineTuning(), dft),
    "kl": (WithKL(CrossEntropy(), 0.4), with_kl),
    "dpo": (DirectPreference(BETA), dpo),
}


@pytest.mark.parametrize("objective,loss", OBJECTIVES.values(), ids=OBJECTIVES.keys())
def test_loss_and_gradients_are_those_of_trl(setting: Setting, objective: Objective, loss: Loss) -> None:
    samples = make_samples((70, 21, 12, 40), VOCAB)
    sums = check(setting, samples, objective, loss, 2)
    pairs = isinstance(objective, DirectPreference)
    assert sums.count == (2 if pairs else sum(sum(t != -100 for t in labels[1:]) for _, labels in samples))


@pytest.fixture(scope="module")
def low(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    sizes = {"hidden_size": 128, "intermediate_size": 320, "num_attention_heads": 4}
    return Setting("llama", tmp_path_factory.mktemp("low"), torch.bfloat16, **sizes)


@pytest.mark.parametrize(
    "name", ["label smoothing", "dft", *(pytest.param(n, marks=pytest.mark.long) for n in ("kl", "dpo"))]
)
def test_bfloat16_error_is_no_larger_than_that_of_peft_under_autocast(low: Setting, name: str) -> None:
    """In the geometric mean over batches: the weights of kl and dpo rest on sums of bf16 log-probabilities,
    whose error falls to either side in a single one, by up to an order of magnitude in dpo."""
    objective, loss = OBJECTIVES[name]
    ratios = []
    for seed in range(16 if objective.needs_reference else 2):
        samples = make_samples((96, 50, 60, 33), VOCAB, seed=seed)
        _, exact = oracle(low, samples, loss, torch.float64)
        errors = [oracle(low, samples, loss, torch.bfloat16)[1], low.run(objective, [samples])[1]]
        theirs, ours = (sum(float((e[k] - g).square().sum()) for k, g in exact.items()) for e in errors)
        ratios.append(ours / theirs)
    assert 0 < math.prod(ratios) ** (1 / len(ratios)) <= 1.1


def test_gradients_through_a_capped_head(tmp_path: Path) -> None:
    gemma = Setting("gemma2", tmp_path)
    assert gemma.decoder.config.logit_cap > 0
    check(gemma, make_samples((30, 21), VOCAB), DirectPreference(BETA), dpo, 2)


def test_pairs_longer_than_a_chunk_are_scored_ahead(setting: Setting) -> None:
    samples = make_samples((20, 30, 330, 250, 40, 12), VOCAB)
    (microbatch,) = [Microbatch(samples)]
    chunks = DirectPreference(BETA).chunks(microbatch, 64)
    assert [c.start for c in chunks] == [0, *(c.end for c in chunks[:-1])]
    assert chunks[-1].end == microbatch.num_trained and max(c.end - c.start for c in chunks) <= 64
    assert not chunks[0].ahead and not chunks[-1].ahead and all(c.ahead for c in chunks[1:-1])
    assert all(c.start % 64 == 0 for c in chunks[2:-1]), "cut where sums over tokens are"
    check(setting, samples, DirectPreference(BETA), dpo, 6)


def test_small_pairs_share_a_chunk_and_none_is_cut() -> None:
    microbatch = Microbatch(make_samples((50,) * 24, VOCAB))
    starts = set(microbatch.trained_starts[::2].tolist())
    chunks = DirectPreference(BETA).chunks(microbatch, CHUNK)
    assert 1 < len(chunks) < 8 and not any(c.ahead for c in chunks)
    assert all(c.start in starts and c.end in starts and c.end - c.start <= CHUNK for c in chunks)


def test_weights_of_either_sign(setting: Setting) -> None:
    """Liger-Kernel#968: a loss with a weight for each token, and none of it lost in the gradient. Zero is the
    same as not trained; the mean is over the tokens that are."""
    generator = torch.Generator().manual_seed(1)
    samples, given = [], []
    for ids, labels in make_samples((50, 33), VOCAB):
        weights = torch.randn(len(ids), generator=generator)
        weights[::5] = 0.0
        samples.append((ids, labels, weights.tolist()))
        kept = torch.tensor(labels[1:]) != -100
        given.append(weights[1:][kept])

    def weighted(logits, targets, bases):
        own, weights = torch.cat(logps(logits, targets)), torch.cat(given)
        return -(weights * own).sum() / int((weights != 0).sum())

    sums = check(setting, samples, CrossEntropy(), weighted, 1)
    assert sums.count == sum(int((w != 0).sum()) for w in given)


def test_a_weight_of_zero_changes_no_bit_of_the_others(setting: Setting) -> None:
    ((ids, labels),) = make_samples((90,), VOCAB)
    weights = [0.0 if i % 3 == 0 else 1.0 for i in range(90)]
    masked = [-100 if i % 3 == 0 else label for i, label in enumerate(labels)]
    one, first = setting.run(CrossEntropy(), [[(ids, labels, weights)]])
    two, second = setting.run(CrossEntropy(), [[(ids, masked)]])
    assert one == two and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.skipif(native is None, reason="the compiled kernels are missing: bits hold for them only")
@pytest.mark.parametrize("objective", [DirectPreference(BETA), WithKL(DynamicFineTuning(), 0.1)])
@pytest.mark.parametrize("window,call", [(128, 1), (1000, 64), (64, 150)])
def test_windows_and_calls_change_no_bit(
    setting: Setting, objective: Objective, window: int, call: int
) -> None:
    samples = [make_samples((90, 71, 330, 80), VOCAB)]
    whole, expected = setting.run(objective, samples)
    sums, gradients = setting.run(objective, samples, window, call=call)
    assert sums == whole and all(torch.equal(gradients[key], expected[key]) for key in expected)


def test_a_pass_that_loses_its_memory_starts_over_to_the_same_bits(setting: Setting) -> None:
    samples = make_samples((90, 71, 330, 80), VOCAB)
    whole, expected = setting.run(DirectPreference(BETA), [samples])
    lost: set[tuple[int, int, int]] = set()

    def lose(run: BatchRun, sequence: TrainingSequence) -> None:
        """At every place once: after each window and unit of the scoring pass, and of the other."""
        place = (sequence.pass_index, sequence.cursor, sequence.unit_cursor)
        if place not in lost and place[1:] != (0, 0):
            lost.add(place)
            run.forget({sequence.sequence_id})
            setting.adapter.zero_gradients()
            sequence.restart()

    sums, gradients = setting.run(DirectPreference(BETA), [samples], window=128, before=lose)
    assert {place[0] for place in lost} == {0, 1} and max(place[2] for place in lost) > 5
    assert sums == whole and all(torch.equal(gradients[key], expected[key]) for key in expected)


@pytest.mark.parametrize("start", [None, "job/start"])
def test_preference_training_starts_at_ln_2(setting: Setting, start: str | None) -> None:
    """trl#1340, trl#495: a fresh adapter against the base, a trained one against its frozen copy."""
    before = setting.adapter.parameters.clone()
    if start is None:
        for module in setting.adapter.modules:
            module.b_RN.zero_()
        setting.adapter.write_rows(setting.pool, ROWS["job"])
    sums, gradients = setting.run(DirectPreference(0.1), [make_samples((60, 20, 33, 41), VOCAB)], start=start)
    setting.adapter.parameters.copy_(before)
    setting.adapter.write_rows(setting.pool, ROWS["job"])
    assert sums.loss / sums.count == pytest.approx(math.log(2), abs=1e-12)
    assert sums.correct == 0
    assert any(bool(gradient.any()) for gradient in gradients.values())


def test_against_the_base_a_trained_adapter_is_elsewhere(setting: Setting) -> None:
    sums, _ = setting.run(DirectPreference(0.1), [make_samples((60, 20), VOCAB)])
    assert abs(sums.loss - math.log(2)) > 1e-3


def test_divergence_from_itself_is_nothing(setting: Setting) -> None:
    samples = [make_samples((60, 20), VOCAB)]
    plain, expected = setting.run(CrossEntropy(), samples)
    sums, gradients = setting.run(WithKL(CrossEntropy(), 5.0), samples, start="job/start")
    assert sums == plain and all(torch.equal(gradients[key], expected[key]) for key in expected)


def test_a_loss_that_is_not_finite_is_told_as_such() -> None:
    microbatch = Microbatch(make_samples((9, 9), VOCAB))
    microbatch.logprobs_T[microbatch.trained_rows[0]] = -math.inf
    microbatch.weights_T[microbatch.trained_rows[1]] = -1.0
    microbatch.logprobs_T[microbatch.trained_rows[1]] = -math.inf
    for objective in (CrossEntropy(), DirectPreference(0.1)):
        assert math.isnan(objective.sums(microbatch).loss)


@pytest.mark.parametrize(
    "method,settings,param",
    [
        ("kto", {}, "method"),
        ("dpo", {"label_smoothing": 0.1}, "training.label_smoothing"),
        ("dft", {"label_smoothing": 0.1}, "training.label_smoothing"),
        ("supervised", {"label_smoothing": 1.0}, "training.label_smoothing"),
        ("dpo", {"kl_coef": 0.1}, "training.kl_coef"),
        ("dft", {"kl_coef": -0.1}, "training.kl_coef"),
        ("dpo", {"beta": 0.0}, "training.beta"),
    ],
)
def test_settings_without_a_meaning_are_refused(method: str, settings: dict, param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        make_objective(method, TrainingSpec(**settings))
    assert refused.value.param == param


def test_a_method_gets_its_objective() -> None:
    assert isinstance(make_objective("dft", TrainingSpec()), DynamicFineTuning)
    assert make_objective("dpo", TrainingSpec(beta=0.7)).beta == 0.7  # type: ignore[attr-defined]
    held = make_objective("supervised", TrainingSpec(kl_coef=0.2, label_smoothing=0.1))
    assert isinstance(held, WithKL) and held.coefficient == 0.2
    assert isinstance(held.inner, CrossEntropy) and held.inner.label_smoothing == 0.1
