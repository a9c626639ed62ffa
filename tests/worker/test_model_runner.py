"""Training windows beside inference rows, in one batch."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from coserve.core.adapter_slots import AdapterSlots
from coserve.core.request import Request
from coserve.core.sampling_params import SamplingParams
from coserve.core.span import InferenceSpan, SpanKind, TrainingSpan
from coserve.core.step_plan import StepPlan
from coserve.core.training_sequence import TrainingPass, TrainingSequence
from coserve.kernels.dispatch import native
from coserve.kernels.dropout import row_keys
from coserve.lora.adapter import load_adapter
from coserve.lora.adapter_pool import AdapterPool
from coserve.training.activations import MicrobatchActivations
from coserve.training.microbatch import LoraDropout, Microbatch
from coserve.worker.forward_batch import build_forward_batch
from coserve.worker.kv_tensors import KVTensors
from coserve.worker.model_runner import ModelRunner

SAMPLES = [list(range(10, 50)), list(range(3, 33)), [7] * 20]


class Bench:
    """Two adapters on the device, one microbatch for "all" from slab 16 on, requests by hand."""

    def __init__(self, models):
        self.decoder = models.decoder
        config = self.decoder.config
        self.kv = KVTensors(config, 400, 4, torch.float32)
        # Fresh memory may hold anything; nothing that wasn't written may be read.
        self.kv.arena.view(torch.float32).fill_(float("nan"))
        self.pool = AdapterPool(config, 16, torch.float32)
        self.slots = AdapterSlots(16, 4)
        for name, path in models.adapters.items():
            adapter = load_adapter(path, config)
            slot, _ = self.slots.allocate(name, adapter.rank)
            self.pool.write(slot.rows, adapter)
        self.runner = ModelRunner(self.decoder, self.kv, self.pool, self.slots)
        self.microbatch = Microbatch([(sample, sample) for sample in SAMPLES])
        tokens = self.microbatch.num_tokens
        place(self)
        passes = (TrainingPass("all", (), trains=True),)
        self.sequence = TrainingSequence("mb", "job", 0, tokens, passes, level_slabs=(1,))

    def request(self, name, prompt, blocks, adapter=None):
        params = SamplingParams(temperature=0.0)
        request = Request(name, prompt, params, adapter=adapter, max_model_len=64)
        request.block_table = blocks
        return request

    def window(self, start, length):
        return TrainingSpan(SpanKind.TRAIN_FORWARD, self.sequence, start, length)


def place(bench):
    config, tokens = bench.decoder.config, bench.microbatch.num_tokens
    shape = (config, config.num_layers, tokens, torch.float32, 0)
    slabs = bench.kv.slabs_for(MicrobatchActivations.nbytes(*shape))
    bench.microbatch.activations = MicrobatchActivations(bench.kv.extent(16, slabs), *shape)


@pytest.fixture
def bench(models):
    return Bench(models)


def prefill(request):
    return InferenceSpan(SpanKind.PREFILL, request, 0, request.num_tokens, True)


def test_windows_leave_what_transformers_computes(bench, models):
    cuts = [0, 13, 64, 90]
    for start, end in pairwise(cuts):
        plan = StepPlan(training_forward=[bench.window(start, end - start)])
        assert bench.runner.run(plan, {"mb": bench.microbatch}).sampled == {}
    with torch.no_grad():
        hidden = bench.decoder.final_norm(bench.microbatch.activations.x_out_TH)
        model, begin = models.hf("all"), 0
        for sample in SAMPLES:
            expected = model(input_ids=torch.tensor([sample])).logits[0]
            got = bench.decoder.logits(hidden[begin : begin + len(sample)])
            assert torch.allclose(got, expected, atol=2e-4)
            begin += len(sample)


def test_windows_apart_rest_inside_a_layer_and_go_on(bench):
    """The same bits as in one go; other windows than those that rest begin anew."""
    plan = StepPlan(training_forward=[bench.window(0, 64)], apart=True)
    microbatches = {"mb": bench.microbatch}
    layers, runner = len(bench.decoder.layers), bench.runner
    assert runner.run(plan, microbatches).sampled == {}
    assert runner.run_apart(plan, microbatches, lambda: False) == layers and not runner.is_resting
    whole = bench.microbatch.activations.x_out_TH[:64].clone()
    bench.microbatch.activations.x_out_TH.zero_()
    ran = []
    while not ran or runner.is_resting:
        ran.append(runner.run_apart(plan, microbatches, lambda: True))
    assert ran == [0.5] * 2 * layers
    assert torch.equal(bench.microbatch.activations.x_out_TH[:64], whole)
    runner.run_apart(plan, microbatches, lambda: True)
    other = StepPlan(training_forward=[bench.window(0, 13)], apart=True)
    assert runner.run_apart(other, microbatches, lambda: False) == layers


def test_inference_and_training_do_not_disturb_each_other(bench, models):
    """Same tokens and same activations as when each runs alone."""
    prompts = {"a": ([5, 17, 3], None, [3]), "b": ([9, 9, 31, 44, 2, 7], "all", [0, 1])}
    requests = [bench.request(n, p, blocks, adapter) for n, (p, adapter, blocks) in prompts.items()]
    alone = bench.runner.run(StepPlan(inference=[prefill(r) for r in requests]), {})
    bench.runner.run(StepPlan(training_forward=[bench.window(0, 64)]), {"mb": bench.microbatch})
    x_alone = bench.microbatch.activations.x_out_TH[:64].clone()
    bench.microbatch.activations.x_out_TH.zero_()
    plan = StepPlan(inference=[prefill(r) for r in requests], training_forward=[bench.window(0, 64)])
    both = bench.runner.run(plan, {"mb": bench.microbatch})
    assert both == alone and both.sampled.keys() == {"a", "b"}
    x_both = bench.microbatch.activations.x_out_TH[:64]
    if native is not None:
        assert torch.equal(x_both, x_alone)
    assert torch.allclose(x_both, x_alone, atol=1e-5)


def test_neighbours_of_one_adapter_share_a_segment(bench):
    spans = [
        prefill(bench.request("a", [1, 2], [0], None)),
        prefill(bench.request("b", [3, 4, 5], [1], "some")),
        prefill(bench.request("c", [6], [2], "some")),
        prefill(bench.request("d", [7, 8], [3], "all")),
    ]
    plan = StepPlan(inference=spans, training_forward=[bench.window(0, 10), bench.window(10, 5)])
    batch = build_forward_batch(plan, {"mb": bench.microbatch}, bench.kv, bench.pool, bench.slots)
    segments = batch.lora.segments
    assert segments.token_start.tolist() == [2, 6]
    assert segments.token_end.tolist() == [6, 23]
    some, trained = bench.slots.rows("some"), bench.slots.rows("all")
    assert segments.rows.tolist() == [*some, *trained] and segments.row_offset.tolist() == [0, len(some)]
    assert batch.lora.ranks_LMS.shape == (2, 7, 2)
    assert batch.token_ids_T.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, *range(10, 25)]
    assert [(w.row_start, w.rows, w.window_start) for w in batch.windows] == [(8, 10, 0), (18, 5, 10)]


def test_only_training_rows_are_dropped(bench):
    """Each window has its own keys and rate; a chat row's segment has rate 0, also beside its own adapter."""
    dropout = LoraDropout(0.25, seed=1, step=2, examples=(5, 6, 7))
    bench.microbatch = Microbatch([(sample, sample) for sample in SAMPLES], dropout=dropout)
    place(bench)
    spans = [prefill(bench.request("a", [1, 2], [0], "some")), prefill(bench.request("b", [3], [1], "all"))]
    plan = StepPlan(inference=spans, training_forward=[bench.window(36, 8), bench.window(44, 3)])
    batch = build_forward_batch(plan, {"mb": bench.microbatch}, bench.kv, bench.pool, bench.slots)
    assert batch.lora.segments.token_start.tolist() == [0, 2, 3, 11]
    assert batch.lora.dropout.rates_S.tolist() == [0.0, 0.0, 0.25, 0.25]
    keys = [*row_keys(1, 2, 5, np.arange(36, 40)), *row_keys(1, 2, 6, np.arange(7))]
    assert batch.lora.dropout.keys_T.tolist() == [0, 0, 0, *keys]


def test_slots_and_tables_follow_the_block_table(bench):
    request = bench.request("a", list(range(10, 19)), [5, 2, 7])
    span = InferenceSpan(SpanKind.PREFILL, request, 3, 6, True)
    other = InferenceSpan(SpanKind.DECODE, bench.request("b", [1], [9]), 0, 1, True)
    batch = build_forward_batch(StepPlan(inference=[span, other]), {}, bench.kv, bench.pool, bench.slots)
    rows = batch.inference
    assert rows.slots_T.tolist() == [23, 8, 9, 10, 11, 28, 36]
    assert rows.block_tables_SB.tolist() == [[5, 2, 7], [9, 0, 0]]
    assert rows.query_start_S1.tolist() == [0, 6, 7] and rows.context_lens_S.tolist() == [9, 1]
    assert batch.positions_T.tolist() == [3, 4, 5, 6, 7, 8, 0] and batch.lora is None


def test_spans_that_do_not_sample_give_no_token(bench):
    request = bench.request("a", list(range(8)), [0, 1])
    span = InferenceSpan(SpanKind.PREFILL, request, 0, 4, False)
    assert bench.runner.run(StepPlan(inference=[span]), {}).sampled == {}
    assert bench.runner.run(StepPlan(), {}).sampled == {}
