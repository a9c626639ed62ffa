"""Training without scheduler or engine, and the same through PEFT and autograd."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import repeat, takewhile

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from coserve.core.training_sequence import TrainingSequence
from coserve.kernels.dropout import Dropout, keep_mask, module_salt, row_keys
from coserve.kernels.lora import LoraSegments
from coserve.layers.batch import ForwardBatch, LoraBatch
from coserve.lora.adapter_pool import AdapterPool
from coserve.models.decoder import Decoder
from coserve.training.activations import MicrobatchActivations
from coserve.training.backward import MicrobatchBackward
from coserve.training.batch_run import BatchRun
from coserve.training.batching import pack
from coserve.training.microbatch import LoraDropout, Microbatch, Sample
from coserve.training.prefixes import SharedRun
from coserve.training.trainable_adapter import TrainableAdapter
from coserve.worker.kv_tensors import KVTensors


@dataclass
class Trainer:
    """A decoder, an adapter and its rows in a pool; other rows hold garbage."""

    decoder: Decoder
    adapter: TrainableAdapter
    rows: list[int]
    pool: AdapterPool

    @classmethod
    def make(cls, decoder: Decoder, adapter: TrainableAdapter) -> Trainer:
        pool = AdapterPool(decoder.config, adapter.rank + 3, decoder.dtype, decoder.device)
        for layer in range(decoder.config.num_layers):
            for module in range(len(decoder.config.linear_modules)):
                for tensor in pool.rows(module, layer):
                    tensor.fill_(float("nan"))
        rows = list(range(adapter.rank + 2, 2, -1))
        adapter.place(pool, rows)
        return cls(decoder, adapter, rows, pool)

    def lora_batch(self, tokens: int, dropout: Dropout | None = None) -> LoraBatch:
        values = [0], [tokens], [0], self.rows
        segments = LoraSegments(*(torch.tensor(v, dtype=torch.int32) for v in values))
        return LoraBatch(segments, self.adapter.ranks_LM[..., None].contiguous(), self.pool, dropout)

    def forward(self, microbatch: Microbatch, window_tokens: int) -> None:
        width = window_tokens or microbatch.num_tokens
        for start in range(0, microbatch.num_tokens, width):
            length = min(width, microbatch.num_tokens - start)
            span = slice(start, start + length)
            window = microbatch.window(0, start, length)
            batch = ForwardBatch(
                microbatch.token_ids_T[span],
                microbatch.positions_T[span],
                None,
                [window],
                self.lora_batch(length, window.dropout),
            )
            self.decoder.forward(batch)

    @torch.no_grad()
    def gradients(
        self,
        samples: Sequence[Sample],
        *,
        forward_window: int = 0,
        backward_window: int | None = 0,
        microbatch_tokens: int = 1 << 30,
        level: int | None = None,
        before_unit: Callable[[int, Microbatch], None] | None = None,
        calls: Iterable[int] = repeat(1),
        dropout: LoraDropout | None = None,
        shared: Sequence[SharedRun] = (),
    ) -> float:
        """Fills the adapter's gradients of the mean loss over all samples' trained tokens; returns it.

        `level` is the activations' (the highest by default); `before_unit` is called with a backward unit's
        index and the microbatch before each call. A backward window of 0 is the whole microbatch, None are
        tiles, as many of which as `calls` says run as one where they join. `dropout` holds an example number
        for every sample, `shared` which of them share a prefix where all are in one microbatch.
        """
        adapter, config = self.adapter, self.decoder.config
        trained = sum(sum(label != -100 for label in labels[1:]) for _, labels in samples)
        adapter.zero_gradients()
        losses = []
        for run in pack([len(ids) for ids, _ in samples], microbatch_tokens):
            drop = dropout and dropout._replace(examples=[dropout.examples[i] for i in run])
            microbatch = Microbatch([samples[i] for i in run], dropout=drop, shared=shared)
            shape = (
                config,
                config.num_layers,
                microbatch.num_tokens,
                self.decoder.dtype,
                adapter.lowest_layer,
            )
            extent = torch.full((MicrobatchActivations.nbytes(*shape),), 255, dtype=torch.uint8)
            microbatch.activations = MicrobatchActivations(extent, *shape, level)
            self.forward(microbatch, forward_window)
            backward = MicrobatchBackward(
                self.decoder,
                microbatch,
                adapter,
                self.pool,
                self.rows,
                grad_scale=1 / trained,
                window_tokens=0 if backward_window is None else backward_window or microbatch.num_tokens,
            )
            lengths = iter(calls)
            while not backward.done:
                if before_unit is not None:
                    before_unit(backward.cursor, microbatch)
                length, left = next(lengths), backward.units[backward.cursor + 1 :]
                joined = takewhile(lambda unit: unit.joins, left[: length - 1])
                backward.run_next(1 + len(list(joined)))
            losses.append(backward.objective.sums(microbatch).loss)
        adapter.finish_gradients()
        return sum(losses) / trained


@torch.no_grad()
def drive(
    run: BatchRun,
    decoder: Decoder,
    pool: AdapterPool,
    rows: dict[str, list[int]],
    kv: KVTensors,
    window_tokens: int = 64,
    before: Callable[[BatchRun, TrainingSequence], None] | None = None,
    call_tokens: int = 256,
) -> None:
    """All passes of a batch, one microbatch after the other, neighbouring units in calls of `call_tokens`.
    `rows` are the pool's by adapter; `before` is called before each window and call and may take the memory
    away."""
    for sequence in run.sequences:
        sequence.level = len(sequence.level_slabs) - 1
        microbatch = run.microbatches[sequence.sequence_id]
        while not sequence.done:
            if before is not None:
                before(run, sequence)
            if microbatch.activations is None:
                extent = torch.full((sequence.slabs * kv.slab_bytes,), 255, dtype=torch.uint8)
                run.place(sequence.sequence_id, extent, sequence.level)
            if sequence.forward_done:
                length = sequence.call_length(sequence.unit_cursor, len(sequence.units), call_tokens)
                run.run_units(sequence, length)
                sequence.pay_units(length)
                continue
            start, length = sequence.cursor, min(window_tokens, sequence.forward_owed)
            key, span = sequence.adapter, slice(start, start + length)
            lora = None
            if key is not None:
                values = [0], [length], [0], rows[key]
                segments = LoraSegments(*(torch.tensor(v, dtype=torch.int32) for v in values))
                lora = LoraBatch(segments, pool.ranks(rows[key])[..., None].contiguous(), pool)
            assert not (lora and microbatch.dropout_keys_T is not None), "this driver knows no dropout"
            window = microbatch.window(0, start, length, trains=sequence.trains)
            ids_T, positions_T = microbatch.token_ids_T[span], microbatch.positions_T[span]
            decoder.forward(ForwardBatch(ids_T, positions_T, None, [window], lora))
            sequence.cursor += length


def gradient_tensors(adapter: TrainableAdapter) -> dict[str, torch.Tensor]:
    """PEFT's key -> gradient in PEFT's shape, of what is trained."""
    masters, keys = adapter.tensors(), iter(adapter.tensors())
    found = {}
    for module in adapter.modules:
        a_key, b_key = next(keys), next(keys)
        if module.da_RK is not None:
            found[a_key] = module.da_RK.clone()
        found[b_key] = module.db_RN.t().clone()
    assert found.keys() <= masters.keys()
    return found


def fill_b(adapter: TrainableAdapter, size: float = 0.3) -> None:
    """B away from zero, so that A has a gradient."""
    generator = torch.Generator().manual_seed(5)
    for module in adapter.modules:
        module.b_RN.copy_(torch.randn(module.b_RN.shape, generator=generator) * size)


def make_peft(
    reference: PreTrainedModel, adapter: TrainableAdapter, dtype: torch.dtype, adapter_dtype: torch.dtype
) -> PeftModel:
    """PEFT around a copy of the reference, with the adapter's weights."""
    accepted = LoraConfig.__dataclass_fields__.keys()
    settings = {k: v for k, v in adapter.config.items() if k in accepted and k != "inference_mode"}
    base = copy.deepcopy(reference).to(dtype)
    model = get_peft_model(base, LoraConfig(**settings))
    result = set_peft_model_state_dict(model, {k: v.clone() for k, v in adapter.tensors().items()})
    assert not result.unexpected_keys
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapter_dtype)
    return model.train()


class MaskedDropout(torch.nn.Module):
    """Stands for PEFT's dropout of one module: the masks that this product draws for `sample`."""

    def __init__(self, dropout: LoraDropout, salt: int) -> None:
        super().__init__()
        self.dropout, self.salt, self.sample = dropout, salt, -1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rate, example = self.dropout.rate, self.dropout.examples[self.sample]
        keys = row_keys(self.dropout.seed, self.dropout.step, example, np.arange(x.shape[-2]))
        exact_rate = torch.tensor(rate, dtype=torch.float64)
        return x * keep_mask(torch.from_numpy(keys), self.salt, x.shape[-1], exact_rate) / (1 - rate)


def mask_dropout(
    model: PeftModel, adapter: TrainableAdapter, dropout: LoraDropout | None
) -> list[MaskedDropout]:
    """Replace the dropout of every adapted module by our masks; `peft_loss` tells them the sample."""
    masks = []
    for module in adapter.modules if dropout is not None else []:
        layer = model.get_submodule(f"base_model.model.{module.path}")
        assert layer.lora_dropout["default"].p == dropout.rate
        masks.append(MaskedDropout(dropout, module_salt(module.layer, module.module)))
        layer.lora_dropout["default"] = masks[-1]
    return masks


def peft_loss(
    model: PeftModel,
    samples: Sequence[Sample],
    autocast: bool = False,
    masks: Sequence[MaskedDropout] = (),
) -> torch.Tensor:
    """Mean loss over all samples' trained tokens, each sample run by itself."""
    total, trained = torch.zeros(()), 0
    for index, (ids, labels) in enumerate(samples):
        for mask in masks:
            mask.sample = index
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(torch.tensor([list(ids)])).logits[0, :-1]
        if logits.dtype == torch.bfloat16:
            logits = logits.float()
        targets = torch.tensor(list(labels[1:]))
        total = total + cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
        trained += int((targets != -100).sum())
    return total / trained


def peft_gradients(model: PeftModel) -> dict[str, torch.Tensor]:
    """PEFT's exported key -> gradient."""
    return {
        name.replace(".default", ""): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def make_samples(lengths: Sequence[int], vocab: int, seed: int = 3) -> list[Sample]:
    """Random tokens; about a third of the labels are not trained, the second half of them always are."""
    generator = torch.Generator().manual_seed(seed)
    samples: list[Sample] = []
    for length in lengths:
        ids = torch.randint(0, vocab, (length,), generator=generator)
        masked = torch.rand(length, generator=generator) < 0.6
        masked[length // 2 :] = False
        samples.append((ids.tolist(), torch.where(masked, -100, ids).tolist()))
    return samples
