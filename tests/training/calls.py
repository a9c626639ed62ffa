"""Calls to a model in an engine, and what autograd says of the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from coserve.engine import messages as m
from coserve.engine.local import LocalEngine
from coserve.training.called_model import CalledModel
from coserve.training.job import JobSpec, LoraSpec, TrainingSpec
from coserve.training.model_calls import (
    AdamParams,
    CallResult,
    Datum,
    Load,
    LossSettings,
    ModelCall,
    Pass,
    Save,
    Update,
)
from tests.invariants import world

ADAM = AdamParams(learning_rate=5e-3)


def spec_of(model_id: str = "m-1", seed: int = 3, rank: int = 4) -> JobSpec:
    return JobSpec(
        job_id=model_id,
        data_path="",
        checkpoint_dir="",
        seed=seed,
        lora=LoraSpec(r=rank, lora_alpha=8.0, target_modules=world.TARGETS),
        training=TrainingSpec(max_grad_norm=0.0),
        method="calls",
    )


def datum(
    tokens: Sequence[int],
    targets: Sequence[int],
    coefficients: Sequence[float],
    sampled: Sequence[float] | None = None,
) -> Datum:
    return Datum(
        np.asarray(tokens, "<i4").tobytes(),
        np.asarray(targets, "<i4").tobytes(),
        np.asarray(coefficients, "<f4").tobytes(),
        b"" if sampled is None else np.asarray(sampled, "<f4").tobytes(),
    )


def random_data(
    count: int, seed: int = 0, sampled: bool = False, longest: int = 90
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]]:
    """Tokens, targets, coefficients of either sign (a few are 0), and log-probabilities of another policy."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        length = int(rng.integers(3, longest))
        ids = rng.integers(2, world.VOCAB, length + 1)
        coefficients = rng.standard_normal(length).astype(np.float32)
        coefficients[rng.random(length) < 0.3] = 0.0
        # Close to the policy's own, so that some ratios are within the bounds and some are not.
        q = (-4.5 + 0.5 * rng.standard_normal(length)).astype(np.float32) if sampled else None
        found.append((ids[:-1], ids[1:], coefficients, q))
    return found


def grouped_data(
    groups: int, answers: int, seed: int = 0
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]]:
    """Several answers to each prompt, shuffled; nothing of a prompt counts."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(groups):
        prompt = rng.integers(2, world.VOCAB, int(rng.integers(20, 70)))
        for _ in range(answers):
            ids = np.concatenate([prompt, rng.integers(2, world.VOCAB, int(rng.integers(4, 40)))])
            coefficients = np.full(len(ids) - 1, rng.standard_normal(), np.float32)
            coefficients[: len(prompt) - 1] = 0.0
            q = (-4.5 + 0.5 * rng.standard_normal(len(ids) - 1)).astype(np.float32)
            found.append((ids[:-1], ids[1:], coefficients, q))
    return [found[i] for i in rng.permutation(len(found))]


class Caller:
    """A model in an engine, and calls to it that are waited for."""

    def __init__(self, local: LocalEngine, spec: JobSpec | None = None) -> None:
        self.local, self.spec = local, spec or spec_of()
        reply = local.call(lambda i: m.OpenModel(call_id=i, spec=self.spec))
        assert reply.error is None, reply.error

    @property
    def model(self) -> CalledModel:
        return self.local.engine.jobs.models.by_id[self.spec.job_id]

    def begin(self, call: ModelCall) -> int:
        self.local._calls += 1
        call_id = self.local._calls
        self.local.engine.handle(m.CallModel(call_id=call_id, model_id=self.spec.job_id, call=call))
        return call_id

    def outcome(self, call_id: int) -> CallResult | m.Fault:
        found: list[CallResult | m.Fault] = []

        def look() -> bool:
            for sent in self.local.sent:
                if isinstance(sent, m.ModelResult) and sent.call_id == call_id:
                    found.append(sent.result)
                elif isinstance(sent, m.Reply) and sent.call_id == call_id and sent.error is not None:
                    found.append(sent.error)
            return bool(found)

        self.local.run_until(look, 20_000)
        return found[0]

    def call(self, call: ModelCall) -> CallResult:
        outcome = self.outcome(self.begin(call))
        assert isinstance(outcome, CallResult), outcome
        return outcome

    def forward_backward(
        self, data: list[Datum], loss: str = "cross_entropy", **settings: float
    ) -> CallResult:
        return self.call(Pass(data=data, loss=LossSettings(name=loss, **settings)))

    def forward(self, data: list[Datum]) -> CallResult:
        return self.call(Pass(data=data, loss=LossSettings(), backward=False))

    def update(self, adam: AdamParams = ADAM) -> CallResult:
        return self.call(Update(adam=adam))

    def save(self, folder: Path, optimizer: bool = True) -> Path:
        self.call(Save(directory=str(folder), optimizer=optimizer))
        return folder

    def load(self, folder: Path, optimizer: bool = True) -> None:
        self.call(Load(directory=str(folder), optimizer=optimizer))

    def gradients(self) -> dict[str, torch.Tensor]:
        """By PEFT's keys, of the masters (not the scaled B)."""
        found = {}
        for module in self.model._adapter.modules:
            assert module.da_RK is not None
            found[f"{module.path}.A"] = module.da_RK.clone()
            found[f"{module.path}.B"] = module.db_RN.t() * module.scale
        return found

    def weights(self) -> torch.Tensor:
        return self.model._adapter.parameters.clone()


def logprobs_of(result: CallResult) -> list[np.ndarray]:
    return [np.frombuffer(part, "<f4") for part in result.logprobs]


def autograd(
    model: Path,
    adapter: Path,
    data: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]],
    loss_of: Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor], torch.Tensor],
    dtype: torch.dtype = torch.float64,
) -> tuple[float, list[np.ndarray], dict[str, torch.Tensor]]:
    """Loss, log-probabilities, gradients of PEFT's model; `loss_of(logp, q, coefficients)` is a datum's."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    peft = PeftModel.from_pretrained(base, adapter, is_trainable=True).to(dtype)
    total, logprobs = torch.zeros((), dtype=dtype), []
    for tokens, targets, coefficients, q in data:
        logits = peft(torch.tensor(tokens)[None]).logits[0]
        wanted = torch.tensor(targets).reshape(len(tokens), -1)
        logp = logits.log_softmax(-1).gather(1, wanted).reshape(targets.shape)
        q_T = None if q is None else torch.tensor(q, dtype=dtype)
        total = total + loss_of(logp, q_T, torch.tensor(coefficients, dtype=dtype))
        logprobs.append(logp.detach().numpy())
    total.backward()
    gradients = {}
    for name, parameter in peft.named_parameters():
        if parameter.grad is not None:
            path = name.removeprefix("base_model.model.")
            side = "A" if ".lora_A." in path else "B"
            gradients[f"{path.split('.lora_')[0]}.{side}"] = parameter.grad
    return float(total.detach()), logprobs, gradients
