"""The gradient parity matrix: what is varied, how one case is held against PEFT, and the table of errors.

    python -m tests.parity.gradient_matrix [SEED [CASES]] | --whole

prints for every family the worst case in fp32: the error over its bound (the larger of 1e-5 of the tensor's
largest gradient and twice PEFT's own error), and over the tensor's largest gradient; and in bf16 the error of
the whole adapter over that of PEFT under autocast: root mean square over the cases, since which of two
roundings is luckier in a single one is chance, and the worst. The oracle is PEFT in float64.
"""

from __future__ import annotations

import itertools
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from coserve.models.decoder import Decoder
from coserve.models.loader import load_model
from coserve.training.job import LoraSpec
from coserve.training.microbatch import LoraDropout
from coserve.training.trainable_adapter import TrainableAdapter
from tests.parity.harness import FAMILIES, make_reference, save_reference
from tests.parity.training_harness import (
    Trainer,
    fill_b,
    gradient_tensors,
    make_peft,
    make_samples,
    mask_dropout,
    peft_gradients,
    peft_loss,
)

SAMPLES = make_samples((67, 2, 34), 97)
EXAMPLES = (7, 3, 11)
KV_HEADS = (6, 2, 1)  # of six heads
TARGETS: dict[str, dict[str, object]] = {
    "all": {},
    "attention": {"target_modules": ("q_proj", "k_proj", "v_proj", "o_proj")},
    "mlp": {"target_modules": ("gate_proj", "up_proj", "down_proj")},
    "q-v": {"target_modules": ("q_proj", "v_proj")},
    "o-up-top": {"target_modules": ("o_proj", "up_proj"), "layers_to_transform": (1, 2)},
    "down-gap": {"target_modules": ("down_proj",), "layers_to_transform": (0, 2)},
    "head": {"target_modules": ("lm_head",)},
    "up-head": {"target_modules": ("up_proj", "lm_head")},
}
FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"} | {
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}
RANKS = (1, 8, 64, 256)
SCALINGS = ("plain", "patterns", "rslora")
WINDOWS = ((0, 0), (1, 64), (7, 7), (64, 1), (64, 64))


class Cut(NamedTuple):
    """How a case is computed here, which must not matter: windows in tokens (0: whole), samples in one
    microbatch or each alone, and the level of the activation policies (None: all is kept)."""

    windows: tuple[int, int]
    packed: bool
    level: int | None


LEVELS = (None, 0, 2)


def cuts_of(number: int) -> list[Cut]:
    """Every pair of windows once; packing and level go round with the case's number, so that all meet all."""
    return [
        Cut(windows, (number + place) % 2 == 0, LEVELS[(number + place) % 3])
        for place, windows in enumerate(WINDOWS)
    ]


@dataclass(frozen=True)
class Case:
    """What is computed."""

    kind: str
    kv_heads: int
    targets: str
    rank: int
    scaling: str = "plain"
    dropout: float = 0.0
    freeze_a: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def spec(self) -> LoraSpec:
        """The adapter's shape, in the names of the family's modules."""
        chosen = dict(TARGETS[self.targets])
        fused = self.kind.startswith("phi3")
        if fused and chosen:
            names = (FUSED.get(name, name) for name in chosen["target_modules"])  # type: ignore[attr-defined]
            chosen["target_modules"] = tuple(dict.fromkeys(names))
        if self.scaling == "patterns":
            names = tuple(chosen.get("target_modules", ("o_proj",)))  # type: ignore[arg-type]
            other = "lm_head" if "lm_head" in names else r"layers\.2\..*"
            chosen |= {"rank_pattern": {names[0]: self.rank // 2 + 1}, "alpha_pattern": {other: 5.0}}
        return LoraSpec(
            r=self.rank,
            lora_alpha=9.0,
            use_rslora=self.scaling == "rslora",
            lora_dropout=self.dropout,
            freeze_a=self.freeze_a,
            **chosen,  # type: ignore[arg-type]
        )


class Errors(NamedTuple):
    """`bound` and `relative` are the worst of the tensors in fp32 (see above); `whole` is the error of all
    gradients together over PEFT's."""

    bound: float
    relative: float
    whole: float
    loss: float


@lru_cache(maxsize=4)
def models(kind: str, kv_heads: int, dtype: torch.dtype) -> tuple[PreTrainedModel, Decoder]:
    """The family's random model in transformers and here."""
    reference = make_reference(kind, num_key_value_heads=kv_heads).to(dtype)
    with tempfile.TemporaryDirectory() as folder:
        return reference, load_model(save_reference(reference, Path(folder)), "cpu", dtype)


class Runner:
    """A case's oracle and PEFT's own result, computed once; `run` computes ours."""

    def __init__(self, case: Case) -> None:
        reference, decoder = models(case.kind, case.kv_heads, case.dtype)
        adapter = TrainableAdapter(case.spec, decoder.config, seed=11)
        fill_b(adapter, 1.0)
        for module in adapter.modules:  # the adapter's part is of its linear's size, at any rank and scale
            module.b_RN.div_(module.scale * module.rank**0.5)
        self.case = case
        self.trainer = Trainer.make(decoder, adapter)
        self.dropout = LoraDropout(case.dropout, 5, 9, EXAMPLES) if case.dropout else None
        self.exact_loss, self.exact = self._peft(reference, torch.float64, torch.float64)
        _, self.theirs = self._peft(reference, case.dtype, torch.float32)

    def _peft(
        self, reference: PreTrainedModel, dtype: torch.dtype, adapter_dtype: torch.dtype
    ) -> tuple[float, dict[str, torch.Tensor]]:
        model = make_peft(reference, self.trainer.adapter, dtype, adapter_dtype)
        masks = mask_dropout(model, self.trainer.adapter, self.dropout)
        with torch.enable_grad():
            loss = peft_loss(model, SAMPLES, autocast=dtype == torch.bfloat16, masks=masks)
            loss.backward()
        return loss.item(), peft_gradients(model)

    def run(self, cut: Cut) -> Errors:
        """Our gradients under `cut` against the oracle; AssertionError when the tensors aren't PEFT's."""
        loss = self.trainer.gradients(
            SAMPLES,
            forward_window=cut.windows[0],
            backward_window=cut.windows[1],
            microbatch_tokens=1 << 30 if cut.packed else 1,
            level=cut.level,
            dropout=self.dropout,
        )
        ours = gradient_tensors(self.trainer.adapter)
        wanted = {key for key in self.exact if not (self.case.freeze_a and "lora_A" in key)}
        assert ours.keys() == wanted
        bound = relative = our_square = their_square = 0.0
        for key in sorted(wanted):
            exact = self.exact[key]
            ours_off, theirs_off = (ours[key] - exact).abs(), (self.theirs[key] - exact).abs()
            largest, error = float(exact.abs().max()), float(ours_off.max())
            assert largest > 0
            bound = max(bound, error / max(1e-5 * largest, 2 * float(theirs_off.max())))
            relative = max(relative, error / largest)
            our_square += float(ours_off.square().sum())
            their_square += float(theirs_off.square().sum())
        whole = (our_square / their_square) ** 0.5
        return Errors(bound, relative, whole, abs(loss - self.exact_loss) / self.exact_loss)


def whole_of(kind: str) -> Iterator[Case]:
    """Every case of a family: the product of heads, targets, ranks and scalings in fp32; dropout and a frozen
    A with each of the targets; bf16 with each of the targets."""
    for kv_heads, targets in itertools.product(KV_HEADS, TARGETS):
        for rank, scaling in itertools.product(RANKS, SCALINGS):
            yield Case(kind, kv_heads, targets, rank, scaling)
        yield Case(kind, kv_heads, targets, 8, dropout=0.25)
        yield Case(kind, kv_heads, targets, 8, freeze_a=True)
        yield Case(kind, kv_heads, targets, 16, dtype=torch.bfloat16)


def sample_of(kind: str, dtype: torch.dtype, count: int, seed: int = 0) -> list[tuple[Case, list[Cut]]]:
    """`count` random cases of a family with two of their cuts each (all cases if there are fewer)."""
    generator = random.Random(f"{seed} {kind} {dtype}")
    cases = [case for case in whole_of(kind) if case.dtype == dtype]
    chosen = generator.sample(cases, min(count, len(cases)))
    return [(case, generator.sample(cuts_of(generator.randrange(6)), 2)) for case in chosen]


def root_mean_square(values: Sequence[float]) -> float:
    """Of at least one value."""
    return float((sum(value * value for value in values) / len(values)) ** 0.5)


def main(arguments: Sequence[str]) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    seed, count = (0, 1 << 20) if "--whole" in arguments else (*map(int, arguments), 0, 4)[:2]
    print("| family | fp32: error / bound | fp32: error / largest | bf16: error / PEFT's | worst |")
    print("|---|--:|--:|--:|--:|")
    for kind in FAMILIES:
        exact, low = (
            [
                errors
                for case, cuts in sample_of(kind, dtype, count, seed)
                for errors in map(Runner(case).run, cuts)
            ]
            for dtype in (torch.float32, torch.bfloat16)
        )
        bound, relative = max(e.bound for e in exact), max(e.relative for e in exact)
        ratios = [e.whole for e in low]
        row = f"{bound:.2f} | {relative:.1e} | {root_mean_square(ratios):.2f} | {max(ratios):.2f}"
        print(f"| {kind} | {row} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
