"""Checkpoints at optimizer boundaries: all that a job needs to go on to the same bits.

    step-000012/    the files of saved_state.py; the manifest has step, events, evaluation and the settings'
                    fingerprint

It is there whole or not at all. Its events are those of the steps since the checkpoint before it.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import load_file

from coserve.errors import FailedPrecondition
from coserve.lora.peft_files import CONFIG_FILE, TENSOR_FILE
from coserve.training.early_stopping import EvaluationState
from coserve.training.job import JobSpec, LoraSpec, StepMetrics, TrainingSpec
from coserve.training.optimizer import Optimizer
from coserve.training.saved_state import OPTIMIZER_FILE, read_manifest, write_state
from coserve.training.trainable_adapter import TrainableAdapter

FORMAT = 2
KEPT = 3  # beside the best by validation loss
_NAME = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class Checkpoint:
    """One on disk that was checked against its sums. `events` are the steps since the one before it."""

    path: Path
    step: int
    events: list[StepMetrics]
    evaluation: EvaluationState

    def load_into(self, adapter: TrainableAdapter, optimizer: Optimizer) -> None:
        """Set masters, the optimizer's state and its step count."""
        adapter.load(load_file(self.path / TENSOR_FILE))
        optimizer.load_state(load_file(self.path / OPTIMIZER_FILE), self.step)


def fingerprint(spec: JobSpec) -> str:
    """sha256 (hex) over the settings that decide what is computed. Those at their default are left out, so
    that one which a later version adds changes nothing."""
    fields = {
        "seed": spec.seed,
        "lora": _chosen(spec.lora),
        "training": _chosen(spec.training),
        "init": bool(spec.init_path),
        "method": spec.method,
    }
    return hashlib.sha256(msgspec.json.encode(fields, order="deterministic")).hexdigest()


def _chosen(settings: LoraSpec | TrainingSpec) -> dict[str, Any]:
    default = type(settings)()
    values = ((name, getattr(settings, name)) for name in settings.__struct_fields__)
    return {name: value for name, value in values if value != getattr(default, name)}


def writing(
    directory: str | Path,
    step: int,
    adapter: TrainableAdapter,
    optimizer: Optimizer,
    events: Sequence[StepMetrics],
    spec: JobSpec,
    evaluation: EvaluationState,
) -> Callable[[], Path]:
    """What makes the state after optimizer step `step` durable once it is called, on any thread, and forgets
    all but the newest `KEPT` and the best.

    On a CPU it reads masters and moments where they lie: they must stay as they are until it is done. It
    returns the checkpoint's directory. A whole one of the same step is left as it is: replay makes the same.
    """
    manifest = {
        "format": FORMAT,
        "step": step,
        "fingerprint": fingerprint(spec),
        "events": msgspec.to_builtins(list(events)),
        "evaluation": msgspec.to_builtins(evaluation),
    }
    masters = {name: tensor.detach().cpu() for name, tensor in adapter.tensors().items()}
    state = {name: tensor.cpu() for name, tensor in optimizer.state().items()}
    best = evaluation.best_step
    return partial(_write, place(directory, step), masters, dict(adapter.config), state, manifest, best)


def _write(
    target: Path,
    masters: dict[str, torch.Tensor],
    config: dict[str, Any],
    state: dict[str, torch.Tensor],
    manifest: dict[str, Any],
    best_step: int,
) -> Path:
    if target.exists():
        if _read_state(target) is not None:
            return target
        shutil.rmtree(target)
    write_state(target, masters, config, state, manifest)
    prune(target.parent, best_step)
    return target


def newest_whole(directory: str | Path, spec: JobSpec) -> Checkpoint | None:
    """The latest checkpoint whose files are all there and match their sums; None when there is none.

    Raises FailedPrecondition when it was made under other settings than `spec` or by another version.
    """
    for path in sorted(_checkpoints(Path(directory)), key=_step, reverse=True):
        state = _read_state(path)
        if state is None:
            continue
        if state["format"] != FORMAT:
            raise FailedPrecondition(
                f"the checkpoint {path.name} has format {state['format']}, this version reads {FORMAT}; "
                "start a new job from it (init_from)",
                code="checkpoint_mismatch",
            )
        if state["fingerprint"] != fingerprint(spec):
            raise FailedPrecondition(
                f"the checkpoint {path.name} was made with other settings; start a new job",
                code="checkpoint_mismatch",
            )
        events = msgspec.convert(state["events"], list[StepMetrics])
        return Checkpoint(path, state["step"], events, msgspec.convert(state["evaluation"], EvaluationState))
    return None


def place(directory: str | Path, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return Path(directory) / f"step-{step:06d}"


def whole(directory: str | Path, step: int) -> Path | None:
    """The checkpoint of a step, if it is there and matches its sums."""
    path = place(directory, step)
    return path if _read_state(path) is not None else None


def kept_steps(directory: str | Path) -> list[int]:
    """The steps that have a checkpoint, ascending."""
    return sorted(_step(path) for path in _checkpoints(Path(directory)))


def prune(directory: str | Path, best_step: int = 0) -> None:
    """Remove all but the `KEPT` latest checkpoints and the best, and what was left half made."""
    parent = Path(directory)
    for path in parent.glob("step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)
    old = sorted(_checkpoints(parent), key=_step)[:-KEPT]
    for path in (path for path in old if _step(path) != best_step):
        # Renamed first, so that a kill in between leaves no half checkpoint under its name.
        doomed = path.with_name(path.name + ".tmp")
        os.rename(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _checkpoints(parent: Path) -> list[Path]:
    return [path for path in parent.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir()]


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _read_state(path: Path) -> dict[str, Any] | None:
    """state.json of a whole checkpoint; None for a broken one."""
    state = read_manifest(path)
    if state is None:
        return None
    try:
        whole = (
            isinstance(state["format"], int)
            and state["step"] == _step(path)
            and isinstance(state["events"], list)
            and isinstance(state["fingerprint"], str)
            and state["sha256"].keys() == {TENSOR_FILE, CONFIG_FILE, OPTIMIZER_FILE}
        )
    except (KeyError, TypeError, AttributeError):
        return None
    return state if whole else None
