"""Models that are trained by calls: losses, gradients that add up, order, files; and none touches another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coserve.core.step_plan import StepPlan
from coserve.engine import messages as m
from coserve.kernels.cross_entropy import logit_gradient_, token_scores
from coserve.training.backward import MicrobatchBackward
from coserve.training.called_pass import aligned
from coserve.training.dataset import TokenDataset
from coserve.training.loss import _wide_gradient_, _wide_scores
from coserve.training.microbatch import Aligned, Microbatch
from coserve.training.model_calls import AdamParams, CallResult, Datum, Load, LossSettings, Pass, Save, Update
from coserve.training.pass_packing import pack_data, places
from tests.invariants import world
from tests.training.calls import (
    ADAM,
    Caller,
    autograd,
    datum,
    grouped_data,
    logprobs_of,
    random_data,
    spec_of,
)

LOW, HIGH, BETA = 0.7, 1.3, 0.4
LOSSES = {
    "cross_entropy": lambda logp, q, a: -(a * logp).sum(),
    "importance_sampling": lambda logp, q, a: -((logp - q).exp() * a).sum(),
    "ppo": lambda logp, q, a: (
        -torch.minimum((logp - q).exp() * a, (logp - q).exp().clamp(LOW, HIGH) * a).sum()
    ),
    "cispo": lambda logp, q, a: -((logp - q).exp().clamp(LOW, HIGH).detach() * a * logp).sum(),
    "dro": lambda logp, q, a: -(a * logp - 0.5 * BETA * (logp - q) ** 2).sum(),
}
SETTINGS = {
    "ppo": {"clip_low": LOW, "clip_high": HIGH},
    "cispo": {"clip_low": LOW, "clip_high": HIGH},
    "dro": {"beta": BETA},
}


@pytest.fixture(scope="module")
def trained(model, tmp_path_factory) -> tuple[Caller, Path]:
    """A model some updates from its start, and its weights on disk."""
    caller = Caller(world.make_engine(model))
    for seed in range(3):
        caller.forward_backward([datum(*d[:3]) for d in random_data(4, seed)])
        caller.update()
    return caller, caller.save(tmp_path_factory.mktemp("trained") / "w")


@pytest.mark.parametrize("shares", [False, True], ids=["apart", "groups"])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_and_its_gradient_are_autograds(model, trained, loss: str, shares: bool) -> None:
    caller, folder = trained
    data = random_data(9, seed=7, sampled=loss != "cross_entropy", longest=200)
    if shares:
        data = [(*d[:3], None if loss == "cross_entropy" else d[3]) for d in grouped_data(3, 5, seed=3)]
    result = caller.forward_backward([datum(*d) for d in data], loss, **SETTINGS.get(loss, {}))
    value, logprobs, gradients = autograd(model, folder, data, LOSSES[loss])
    assert result.metrics["loss:sum"] == pytest.approx(value, rel=1e-5, abs=1e-4)
    for ours, theirs in zip(logprobs_of(result), logprobs, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
    found = caller.gradients()
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        largest = float(gradient.abs().max())
        torch.testing.assert_close(found[name].double(), gradient, rtol=0, atol=2e-5 * largest, msg=name)
    caller.update(AdamParams(learning_rate=0.0))
    assert not any(gradient.any() for gradient in caller.gradients().values())


def test_a_groups_prompt_is_read_once_where_nothing_of_it_counts(trained) -> None:
    caller, _ = trained
    data = grouped_data(3, 5, seed=4)
    samples = [aligned(datum(*d), False) for d in data]
    whole = sum(len(d[0]) for d in data)
    assert sum(packed.tokens for packed in pack_data(samples, 0)) == whole
    assert sum(packed.tokens for packed in pack_data(samples, 512)) < 0.55 * whole
    for loss, shares in {"ppo": True, "dro": False}.items():
        asked = caller.begin(Pass(data=[datum(*d) for d in data], loss=LossSettings(name=loss)))
        tokens = sum(sequence.num_tokens for sequence in caller.model.sequences)
        assert tokens < 0.55 * whole if shares else tokens == whole
        caller.outcome(asked)
    caller.update(AdamParams(learning_rate=0.0))
    counting = [(ids, targets, np.ones_like(a), q) for ids, targets, a, q in data]
    samples = [aligned(datum(*d), False) for d in counting]
    assert sum(packed.tokens for packed in pack_data(samples, 512)) == whole


@settings(max_examples=60, deadline=None)
@given(
    prompts=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    answers=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 30), st.integers(0, 40)), min_size=1),
    seed=st.integers(0, 9),
)
def test_every_datum_is_read_whole_wherever_it_stands(prompts, answers, seed) -> None:
    """Tokens, targets and weights of each, put together again from its microbatch."""
    rng = np.random.default_rng(seed)
    heads = [rng.integers(2, 9, length) for length in prompts]
    samples = []
    for which, length, quiet in answers:
        ids = np.concatenate([heads[which % len(heads)], rng.integers(2, 9, length)])
        weights = np.ones(len(ids) - 1, np.float32)
        weights[:quiet] = 0.0
        if len(ids) > 1:
            samples.append(Aligned(ids[:-1], ids[1:], weights))
    if not samples:
        return
    packed = pack_data(samples, 80)
    assert sorted(n for one in packed for n in one.numbers) == list(range(len(samples)))
    for one in packed:
        microbatch = Microbatch([samples[n] for n in one.numbers], shared=one.shared)
        assert microbatch.num_tokens == one.tokens
        for number, at in zip(one.numbers, places(one, samples), strict=True):
            rows = [*range(at.first, at.first + at.shared), *range(at.start, at.start + at.own)]
            sample = samples[number]
            assert microbatch.token_ids_T[rows].tolist() == sample.token_ids.tolist()
            assert microbatch.targets_T[rows].tolist() == sample.targets.tolist()
            assert microbatch.weights_T[rows].tolist() == sample.weights.tolist()
            assert microbatch.positions_T[rows].tolist() == list(range(len(rows)))


def test_what_is_only_scored_leaves_no_gradient_and_the_same_logprobs(trained) -> None:
    caller, _ = trained
    data = [datum(*d[:3]) for d in random_data(5, seed=8)]
    forward = caller.forward(data)
    assert not any(gradient.any() for gradient in caller.gradients().values())
    backward = caller.forward_backward(data)
    assert forward.logprobs == backward.logprobs and forward.metrics == backward.metrics
    caller.forward(data)  # what was there stays
    assert any(gradient.any() for gradient in caller.gradients().values())
    caller.update(AdamParams(learning_rate=0.0))


def test_gradients_add_up_until_an_update_takes_them(trained) -> None:
    caller, _ = trained
    data = [datum(*d[:3]) for d in random_data(6, seed=9)]
    one, other = (random_data_gradients(caller, part) for part in (data[:2], data[2:]))
    caller.forward_backward(data[:2])
    caller.forward_backward(data[2:])
    for name, gradient in caller.gradients().items():
        torch.testing.assert_close(gradient, one[name] + other[name], rtol=0, atol=1e-6 * 50)
    caller.update(AdamParams(learning_rate=0.0))


def random_data_gradients(caller: Caller, data: list) -> dict[str, torch.Tensor]:
    caller.forward_backward(data)
    found = caller.gradients()
    caller.update(AdamParams(learning_rate=0.0))
    return found


def test_calls_that_are_asked_for_at_once_are_done_in_their_order(model, tmp_path) -> None:
    """Passes, updates and saves without waiting give the same bits as one after the other."""
    batches = [[datum(*d[:3]) for d in random_data(5, seed)] for seed in range(4)]
    slow, fast = Caller(world.make_engine(model)), Caller(world.make_engine(model))
    for batch in batches:
        slow.forward_backward(batch[:2])
        slow.forward_backward(batch[2:])
        slow.update()
    slow.save(tmp_path / "slow")
    asked = []
    for batch in batches:
        asked += [fast.begin(Pass(data=part, loss=LossSettings())) for part in (batch[:2], batch[2:])]
        asked.append(fast.begin(Update(adam=ADAM)))
    asked.append(fast.begin(Save(directory=str(tmp_path / "fast"), optimizer=True)))
    assert all(isinstance(fast.outcome(call_id), CallResult) for call_id in asked)
    assert torch.equal(slow.weights(), fast.weights())
    for name in ("adapter_model.safetensors", "optimizer.safetensors", "state.json"):
        assert (tmp_path / "slow" / name).read_bytes() == (tmp_path / "fast" / name).read_bytes()
    assert world.pool_is_empty(fast.local)


def test_two_models_and_a_job_dont_touch_each_other(model, data, tmp_path) -> None:
    """open-rl#80: each comes out as if it had been alone, to the bit."""
    batches = {name: [[datum(*d[:3]) for d in random_data(4, seed)] for seed in seeds] for name, seeds in
               {"a": (1, 2, 3), "b": (4, 5, 6)}.items()}  # fmt: skip
    alone = {}
    for name, own in batches.items():
        caller = Caller(world.make_engine(model), spec_of(name, seed=ord(name)))
        for batch in own:
            caller.forward_backward(batch)
            caller.update()
        alone[name] = caller.weights()
    job = world.make_engine(model), world.make_job(data, tmp_path / "alone")
    world.submit(*job)
    world.finish(job[0], job[1].job_id)
    local, spec = world.make_engine(model), world.make_job(data, tmp_path / "together")
    callers = {name: Caller(local, spec_of(name, seed=ord(name))) for name in batches}
    world.submit(local, spec)
    local.add("chat", list(range(2, 20)), world.GREEDY)
    last = []
    for step in range(3):
        for name, caller in callers.items():
            caller.begin(Pass(data=batches[name][step], loss=LossSettings()))
            last.append((caller, caller.begin(Update(adam=ADAM))))
    for caller, call_id in last:
        assert isinstance(caller.outcome(call_id), CallResult)
    world.finish(local, spec.job_id)
    for name, caller in callers.items():
        assert torch.equal(caller.weights(), alone[name])
    assert world.same_bits(world.final_adapter(spec), world.final_adapter(job[1]))


def job_examples(data: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    dataset = TokenDataset.open(data)
    return [(np.asarray(dataset[i][0]), np.asarray(dataset[i][1])) for i in range(len(dataset))]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_loop_of_calls_is_a_fine_tuning_job(model, data, tmp_path, batch_size: int) -> None:
    """Same examples, same settings: to the bit where an example has a microbatch to itself. A job's example
    has one token more, its last, which is nobody's input here: others stand elsewhere in their tiles then."""
    rates = {"learning_rate": 2e-3, "lr_scheduler_type": "constant", "warmup_steps": 0, "max_grad_norm": 1.0}
    steps = {"n_epochs": 1, "batch_size": batch_size, "shuffle": False}
    local, spec = world.make_engine(model), world.make_job(data, tmp_path, **rates, **steps)
    world.submit(local, spec)
    world.finish(local, spec.job_id)
    caller = Caller(world.make_engine(model))
    adam = AdamParams(learning_rate=2e-3, beta2=0.999, eps=1e-8, grad_clip_norm=1.0)
    examples, losses = job_examples(data), []
    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        trained = [labels[1:] != -100 for _, labels in batch]
        weight = 1.0 / sum(int(mask.sum()) for mask in trained)
        asked = [
            datum(ids[:-1], ids[1:], mask * weight) for (ids, _), mask in zip(batch, trained, strict=True)
        ]
        losses.append(caller.forward_backward(asked).metrics["loss:sum"])
        caller.update(adam)
    told = [loss for _, loss, _ in world.progress(local, spec.job_id)]
    assert losses == pytest.approx(told, rel=1e-5)
    final = world.final_adapter(spec)
    own = {name: tensor for name, tensor in caller.model._adapter.tensors().items()}
    if batch_size == 1:
        assert world.same_bits(own, final)
    for name, tensor in final.items():
        torch.testing.assert_close(own[name], tensor, rtol=0, atol=1e-4 * float(tensor.abs().max()))


def test_weights_alone_come_with_a_fresh_optimizer(model, tmp_path) -> None:
    """SkyRL#1993, #2071: moments of before the load must not act on."""
    first = Caller(world.make_engine(model))
    data = [datum(*d[:3]) for d in random_data(4, 1)]
    for _ in range(2):
        first.forward_backward(data)
        first.update()
    folder = first.save(tmp_path / "state")
    first.forward_backward(data)
    first.update()
    after, moments = first.weights(), first.model._optimizer.state()["exp_avg"].clone()
    second = Caller(world.make_engine(model), spec_of("other", seed=99))
    second.forward_backward(data)  # what was accumulated goes with the weights it belonged to
    second.load(folder)
    second.forward_backward(data)
    second.update()
    assert torch.equal(second.weights(), after)
    assert torch.equal(second.model._optimizer.state()["exp_avg"], moments)
    second.load(folder, optimizer=False)
    optimizer = second.model._optimizer
    assert optimizer.step_count == 0 and not any(tensor.any() for tensor in optimizer.state().values())
    second.forward_backward(data)
    second.update()
    assert not torch.equal(second.weights(), after)


def test_weights_without_their_optimizer_and_damaged_ones_are_refused(trained, tmp_path) -> None:
    caller, _ = trained
    before = caller.weights()
    folder = caller.save(tmp_path / "w", optimizer=False)
    found = caller.outcome(caller.begin(Load(directory=str(folder), optimizer=True)))
    assert isinstance(found, m.Fault) and "without their optimizer" in found.message
    with open(folder / "adapter_model.safetensors", "r+b") as file:
        file.seek(-4, 2)
        file.write(b"\0\1\2\3")
    found = caller.outcome(caller.begin(Load(directory=str(folder), optimizer=False)))
    assert isinstance(found, m.Fault) and found.code == "damaged_state"
    other = Caller(caller.local, spec_of("smaller", rank=2))
    small = other.save(tmp_path / "small")
    found = caller.outcome(caller.begin(Load(directory=str(small), optimizer=True)))
    assert isinstance(found, m.Fault) and "shape" in found.message
    assert torch.equal(caller.weights(), before)


def test_a_gradient_that_isnt_finite_changes_nothing(model) -> None:
    caller = Caller(world.make_engine(model))
    before = caller.weights()
    bad = datum([5, 6, 7], [6, 7, 8], [1.0, 1.0, 1.0], [-1e9, -1.0, -1.0])
    result = caller.forward_backward([bad], "importance_sampling")
    assert np.isnan(result.metrics["loss:sum"])
    found = caller.outcome(caller.begin(Update(adam=ADAM)))
    assert isinstance(found, m.Fault) and found.code == "training_diverged"
    assert torch.equal(caller.weights(), before)
    caller.forward_backward([datum([5, 6, 7], [6, 7, 8], [1.0, 1.0, 1.0])])
    caller.update()
    assert torch.isfinite(caller.weights()).all() and not torch.equal(caller.weights(), before)


def test_memory_that_requests_take_changes_no_bit(model) -> None:
    """Microbatches that lose their activations are computed again, beside gradients of earlier passes."""
    batches = [[datum(*d[:3]) for d in random_data(14, seed, longest=300)] for seed in range(3)]
    weights = []
    for disturbed in (False, True):
        caller = Caller(world.make_engine(model, kv_cache_memory_bytes=2 << 20))
        local, queue, lost = caller.local, caller.local.engine.scheduler.training, 0
        for batch in batches:
            asked = [caller.begin(Pass(data=batch, loss=LossSettings())) for _ in range(2)]
            while disturbed and lost < 60 and len(local.engine.jobs.models.by_id["m-1"].sequences):
                local.engine.step()
                queue.now += 1e3
                if lost % 3 == 2:
                    local.engine.jobs.prepare(StepPlan(evicted=queue.evict_one()))
                lost += 1
            for call_id in asked:
                caller.outcome(call_id)
        assert queue.num_evictions >= 10 if disturbed else queue.num_evictions == 0
        weights.append((caller.gradients(), caller.update().metrics, caller.weights()))
    assert world.same_bits(weights[0][0], weights[1][0])
    assert weights[0][1] == weights[1][1] and torch.equal(weights[0][2], weights[1][2])


def test_a_long_pass_goes_in_groups_and_answers_in_its_order(model) -> None:
    caller = Caller(world.make_engine(model))
    some = random_data(40, seed=2, longest=400)
    data = [datum(*d[:3]) for d in some]
    small = [caller.forward(data[i : i + 4]) for i in range(0, 40, 4)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("coserve.training.called_model.GROUP", 3)
        whole = caller.forward(data)
    parts = [part for result in small for part in logprobs_of(result)]
    for ours, theirs in zip(logprobs_of(whole), parts, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    total = sum(result.metrics["loss:sum"] for result in small)
    assert whole.metrics["loss:sum"] == pytest.approx(total, rel=1e-6)


def test_a_model_that_is_closed_leaves_nothing_and_fails_what_it_owes(model) -> None:
    caller = Caller(world.make_engine(model))
    local = caller.local
    free = local.engine.slots.rows_in_use
    data = [datum(*d[:3]) for d in random_data(14, 4, longest=300)]
    asked = [caller.begin(Pass(data=data, loss=LossSettings())), caller.begin(Update(adam=ADAM))]
    local.engine.step()
    assert local.engine.jobs.optimizer_bytes >= 4 * 4 * caller.weights().numel()
    local.engine.handle(m.CloseModel(call_id=1000, model_id="m-1"))
    (reply,) = [s for s in local.sent if isinstance(s, m.Reply) and s.call_id == 1000]
    assert reply.error is None
    for call_id in asked:
        found = caller.outcome(call_id)
        assert isinstance(found, m.Fault) and "unloaded" in found.message
    assert world.pool_is_empty(local) and not local.engine.has_work
    assert local.engine.jobs.optimizer_bytes == local.engine.jobs.workspace_bytes == 0
    assert local.engine.slots.rows_in_use == free - 4
    gone = local.call(lambda i: m.CloseModel(call_id=i, model_id="m-1"))
    assert gone.error is not None and gone.error.kind == "not_found"
    found = caller.outcome(caller.begin(Update(adam=ADAM)))
    assert isinstance(found, m.Fault) and found.kind == "not_found"


def test_a_model_waits_for_adapter_rows_and_for_memory(model) -> None:
    local = world.make_engine(model, max_lora_rank=8, max_loras=1)
    holders = [Caller(local, spec_of(f"m-{n}", rank=8)) for n in range(9)]
    local._calls += 1
    waiting = local._calls
    local.engine.handle(m.OpenModel(call_id=waiting, spec=spec_of("late", rank=8)))
    for _ in range(5):
        local.engine.step()
    assert "late" not in local.engine.jobs.models.by_id
    local.call(lambda i: m.CloseModel(call_id=i, model_id=holders[0].spec.job_id))
    local.run_until(lambda: "late" in local.engine.jobs.models.by_id, 10)
    local.engine.jobs._places._left = 1000
    found = local.call(lambda i: m.OpenModel(call_id=i, spec=spec_of("huge", rank=8)))
    assert found.error is not None and found.error.code == "out_of_memory"


def test_a_pass_that_the_pool_will_never_hold_is_refused_at_once(model) -> None:
    caller = Caller(world.make_engine(model, kv_cache_memory_bytes=1 << 18))
    found = caller.outcome(caller.begin(Pass(data=[datum(*random_data(1, 3, longest=4)[0][:3])] * 300,
                                             loss=LossSettings())))  # fmt: skip
    assert isinstance(found, m.Fault) and found.code == "out_of_memory" and found.param == "data"


def test_a_fault_in_a_pass_is_its_own(model, monkeypatch) -> None:
    caller = Caller(world.make_engine(model))
    data = [datum(*d[:3]) for d in random_data(3, 5)]
    caller.forward_backward(data)
    before = caller.gradients()
    with monkeypatch.context() as patch:
        patch.setattr(MicrobatchBackward, "run_next", lambda *_: 1 / 0)
        found = caller.outcome(caller.begin(Pass(data=data, loss=LossSettings())))
    assert isinstance(found, m.Fault) and found.kind == "internal_error"
    assert world.same_bits(caller.gradients(), before)
    assert world.pool_is_empty(caller.local)
    caller.update()


def test_several_targets_a_token(model, trained) -> None:
    """Distributions as targets, of different widths in one pass, weights of either sign and repeated ids."""
    caller, folder = trained
    rng = np.random.default_rng(5)
    data, asked = [], []
    for width in (3, 1, 5, 3):
        length = int(rng.integers(4, 60))
        tokens = rng.integers(2, world.VOCAB, length)
        targets = rng.integers(2, world.VOCAB, (length, width))
        targets[:, -1] = targets[:, 0]  # twice the same
        weights = rng.standard_normal((length, width)).astype(np.float32)
        data.append((tokens, targets, weights, None))
        one = datum(tokens, targets.reshape(-1), weights.reshape(-1))
        asked.append(Datum(one.tokens, one.targets, one.coefficients, width=width))
    forward = caller.forward(asked)
    result = caller.forward_backward(asked)
    assert forward.logprobs == result.logprobs and result.widths == [3, 1, 5, 3]
    value, logprobs, gradients = autograd(model, folder, data, lambda logp, q, a: -(a * logp).sum())
    assert result.metrics["loss:sum"] == pytest.approx(value, rel=1e-5, abs=1e-4)
    for ours, theirs in zip(logprobs_of(result), logprobs, strict=True):
        np.testing.assert_allclose(ours.reshape(theirs.shape), theirs, atol=2e-5)
    found = caller.gradients()
    for name, gradient in gradients.items():
        largest = float(gradient.abs().max())
        torch.testing.assert_close(found[name].double(), gradient, rtol=0, atol=2e-5 * largest, msg=name)
    caller.update(AdamParams(learning_rate=0.0))


@pytest.mark.parametrize("soft_cap", [0.0, 3.0])
def test_the_gradient_of_several_targets_through_capped_logits(soft_cap: float) -> None:
    torch.manual_seed(3)
    samples = [
        Aligned(np.arange(4), np.zeros(4, np.int64), np.zeros(4, np.float32), wide=(t, w))
        for t, w in [(np.random.default_rng(n).integers(0, 11, (4, 3)), np.ones((4, 3), np.float32) - n)
                     for n in range(2)]
    ]  # fmt: skip
    microbatch = Microbatch(samples)
    rows, targets = microbatch.trained_rows, microbatch.wide_targets_TK
    u = (3 * torch.randn(8, 11)).requires_grad_()
    z = soft_cap * torch.tanh(u / soft_cap) if soft_cap else u
    logp = z.log_softmax(-1).gather(1, targets)
    (-(microbatch.wide_weights_TK * logp).sum()).backward()
    logits, weights = z.detach().clone(), microbatch.wide_weights_TK.sum(1)
    scores = token_scores(logits, targets[:, 0].contiguous())
    wide = _wide_scores(microbatch, rows, logits, scores.lse_C)
    torch.testing.assert_close(microbatch.wide_logprobs_TK, logp.detach(), rtol=0, atol=1e-5)
    logit_gradient_(logits, targets[:, 0].contiguous(), scores.lse_C, weights, torch.zeros(8), soft_cap)
    _wide_gradient_(logits, microbatch, rows, wide, weights, 1.0, soft_cap)
    torch.testing.assert_close(logits, u.grad, rtol=0, atol=1e-5)
