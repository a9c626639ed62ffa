"""Scoring without gradient: values, windows, memory; and the passes of a batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from coserve.core.training_sequence import TrainingSequence
from coserve.errors import FailedPrecondition
from coserve.kernels.dispatch import native
from coserve.lora.adapter_pool import AdapterPool
from coserve.models.loader import load_model
from coserve.training.batch_run import BatchRun, Trainee
from coserve.training.job import LoraSpec
from coserve.training.objectives import CrossEntropy, LossSums, WithKL
from coserve.training.trainable_adapter import TrainableAdapter
from coserve.worker.kv_tensors import KVTensors
from tests.parity.harness import make_reference, save_reference
from tests.parity.training_harness import drive, fill_b, make_peft, make_samples

ROWS = {"job": [0, 1, 2, 3]}


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    reference = make_reference("qwen2-tied")
    folder: Path = save_reference(reference, tmp_path_factory.mktemp("model"))
    decoder = load_model(folder, "cpu", torch.float32)
    adapter = TrainableAdapter(LoraSpec(r=4), decoder.config, seed=2)
    fill_b(adapter)
    pool = AdapterPool(decoder.config, 8, torch.float32)
    adapter.place(pool, ROWS["job"])
    return reference, decoder, adapter, pool, KVTensors(decoder.config, 1000, 4, torch.float32)


def score(setting, samples, *, key: str | None = "job", window: int = 64, **more) -> BatchRun:  # type: ignore[no-untyped-def]
    _, decoder, _, pool, kv = setting
    run = BatchRun(
        decoder,
        CrossEntropy(),
        samples,
        name="e",
        job_id="job",
        adapter=key,
        **{"kv": kv, "pool": pool, "rows": ROWS, **more},
    )
    drive(run, decoder, pool, ROWS, kv, window)
    return run


@pytest.mark.parametrize("key", ["job", None])
def test_scores_are_those_of_transformers(setting, key: str | None) -> None:
    reference, _, adapter, _, _ = setting
    model = make_peft(reference, adapter, torch.float64, torch.float64).eval()
    samples = make_samples((70, 21, 2, 300), 97)
    samples[1] = (samples[1][0], samples[0][0][:21])  # other targets than its own tokens
    loss, right, trained = 0.0, 0, 0
    for ids, labels in samples:
        with torch.no_grad():
            if key is None:
                with model.disable_adapter():
                    logits = model(torch.tensor([ids])).logits[0, :-1]
            else:
                logits = model(torch.tensor([ids])).logits[0, :-1]
        targets = torch.tensor(labels[1:])
        kept = targets != -100
        loss += float(torch.nn.functional.cross_entropy(logits[kept], targets[kept], reduction="sum"))
        right += int((logits.argmax(-1) == targets)[kept].sum())
        trained += int(kept.sum())
    run = score(setting, [samples[:2], samples[2:]], key=key)
    sums = LossSums.total(run.sums())
    assert run.done and sums.count == trained == run.count
    assert sums.loss == pytest.approx(loss, rel=1e-6)
    assert sums.correct == right


@pytest.mark.skipif(native is None, reason="the compiled kernels are missing: bits hold for them only")
@pytest.mark.parametrize("window", [128, 7, 1000])
def test_scores_do_not_depend_on_windows_and_equal_those_of_training(setting, window: int) -> None:
    _, _, adapter, pool, _ = setting
    samples = make_samples((90, 71, 130, 8), 97)
    whole = score(setting, [samples]).sums()
    assert score(setting, [samples], window=window).sums() == whole
    trainee = Trainee(adapter, pool, ROWS["job"])
    adapter.zero_gradients()
    assert score(setting, [samples], window=window, trainee=trainee).sums() == whole
    assert bool(adapter.gradients.any())


def test_scoring_takes_less_memory_than_training_and_gives_it_back(setting) -> None:
    _, _, adapter, pool, _ = setting
    samples = [make_samples((90, 71), 97)]
    scored = score(setting, samples)
    trained = score(setting, samples, trainee=Trainee(adapter, pool, ROWS["job"]))
    assert scored.sequences[0].slabs < trained.sequences[0].slabs / 2
    assert all(m.activations is None for run in (scored, trained) for m in run.microbatches.values())


def test_a_scoring_pass_keeps_nothing_for_a_backward(setting) -> None:
    """The reference goes through a training sequence's memory: keys, values, the output and no more."""
    _, decoder, adapter, pool, kv = setting
    trainee, objective = Trainee(adapter, pool, ROWS["job"]), WithKL(CrossEntropy(), 0.1)
    samples, changed = [make_samples((90, 71), 97)], []

    def look(run: BatchRun, sequence: TrainingSequence) -> None:
        if sequence.pass_index == 0 and sequence.forward_done:
            saved = run.microbatches[sequence.sequence_id].saved
            kept = saved.layer(0)
            buffers = kept.k_TND, kept.v_TND, saved.x_out_TH, kept.x_in_TH, kept.q_TND, kept.gate_up_T2I
            changed.append([not bool(buffer.isnan().all()) for buffer in buffers])

    run = BatchRun(
        decoder, objective, samples, name="e", job_id="job", adapter="job", pool=pool, rows=ROWS,
        trainee=trainee, kv=kv,
    )  # fmt: skip
    adapter.zero_gradients()
    drive(run, decoder, pool, ROWS, kv, 64, look)
    assert changed == [[True, True, True, False, False, False]]


def test_what_never_fits_is_refused_with_the_way_out(setting) -> None:
    with pytest.raises(FailedPrecondition, match="--kv-cache-memory-bytes"):
        small = KVTensors(setting[1].config, 1, 4, torch.float32)
        score(setting, [make_samples((90,), 97)], kv=small)


def test_nothing_to_score_is_an_error(setting) -> None:
    with pytest.raises(ValueError, match="without trained tokens"):
        score(setting, [[([1, 2, 3], [-100] * 3)]])


def test_a_pass_that_starts_over_gives_the_same(setting) -> None:
    _, decoder, _, pool, kv = setting
    samples = [make_samples((300, 300), 97)]
    run = BatchRun(
        decoder, CrossEntropy(), samples, name="e", job_id="job", adapter="job", pool=pool, rows=ROWS, kv=kv
    )
    (sequence,) = run.sequences
    extent = torch.zeros(sequence.slabs * kv.slab_bytes, dtype=torch.uint8)
    run.place(sequence.sequence_id, extent, sequence.level)
    with torch.no_grad():
        run.run_units(sequence, 2)
    sequence.pay_units(2)
    run.forget({sequence.sequence_id})
    sequence.restart()
    drive(run, decoder, pool, ROWS, kv)
    assert run.sums() == score(setting, samples).sums()
