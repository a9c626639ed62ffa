"""Where a step's time goes: every operation timed in place, with the arithmetic and the bytes it moved.

Operations are the public functions of `coserve/kernels` and the products with the base's matrices. While a
`Ledger` is installed every module that imported one of them calls it through a stopwatch.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch

from coserve.kernels.linear import PackedLinear
from coserve.worker.standing_batch import StandingBatches

Arguments = dict[str, Any]
Work = tuple[float, float]  # arithmetic (multiply and add count two), bytes

KERNELS = {
    "adamw": ("adamw_",),
    "adamw_8bit": ("adamw_8bit_",),
    "kv_store": ("kv_store",),
    "cross_entropy": ("token_scores", "logit_gradient_"),
    "lora": ("lora_forward_", "lora_backward"),
    "paged_attention": ("paged_attention",),
    "rms_norm": ("rms_norm", "add_rms_norm", "rms_norm_backward"),
    "rope": ("apply_rope_",),
    "sampling": ("choose_tokens", "token_logprobs", "penalize_"),
    "swiglu": ("swiglu", "swiglu_backward"),
    "window_attention": ("window_attention", "window_attention_backward"),
}


def _nbytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, tuple | list):
        return sum(map(_nbytes, value))
    return 0


def _touched(arguments: Arguments, result: Any) -> float:
    """Bytes of all tensors in and out, each once."""
    return float(sum(map(_nbytes, arguments.values())) + _nbytes(result))


def _product(arguments: Arguments, result: torch.Tensor) -> Work:
    linear = arguments["self"]
    rows = len(result)
    moved = linear.weight_nbytes + rows * (linear.in_features + linear.out_features) * result.element_size()
    return 2.0 * rows * linear.in_features * linear.out_features, moved


def _lora_forward(arguments: Arguments, result: torch.Tensor) -> Work:
    x, segments = arguments["x_TK"], arguments["segments"]
    flop, moved = 0.0, float(_nbytes(x))
    tokens = (segments.token_end - segments.token_start).double()
    for module in arguments["group"].modules:
        ranks, width = arguments["ranks_MS"][module.line], module.b_RN.shape[1]
        flop += 2.0 * float((tokens * ranks).sum()) * (width + x.shape[1])
        moved += float(ranks.sum()) * (width + x.shape[1]) * x.element_size()
        moved += 2.0 * float(tokens[ranks > 0].sum()) * width * x.element_size()
    return flop, moved


def _lora_backward(arguments: Arguments, result: None) -> Work:
    x, modules = arguments["x_TK"], arguments["modules"]
    flop, moved = 0.0, 3.0 * _nbytes(x)
    for m in modules:
        rank, width = len(m.rows), m.b_RN.shape[1]
        # h and db, dh and dx, da: the bottleneck is made again.
        flop += 2.0 * len(x) * rank * (2 * width + 3 * x.shape[1])
        moved += len(x) * width * x.element_size() + 2 * (_nbytes(m.da_rK) + _nbytes(m.db_rN))
        moved += rank * (width + x.shape[1]) * x.element_size()
    return flop, moved


def _paged(arguments: Arguments, result: torch.Tensor) -> Work:
    cache, starts = arguments["k_cache"], arguments["query_start_S1"].tolist()
    heads, dim = result.shape[1:]
    pairs, keys = 0.0, 0
    for index, context in enumerate(arguments["context_lens_S"].tolist()):
        rows = starts[index + 1] - starts[index]
        pairs += rows * (context - (rows - 1) / 2)
        keys += context
    moved = 2 * keys * cache.shape[2] * cache.shape[3] * cache.element_size() + 2 * _nbytes(result)
    return 4.0 * pairs * heads * dim, moved


def _window(arguments: Arguments, result: Any, passes: float) -> Work:
    q, start = arguments["q_WND"], arguments["window_start"]
    first = arguments["first_key_W"].double()
    pairs = float((torch.arange(start, start + len(q)) + 1 - first).sum())
    gaps = arguments.get("gaps_W2")
    pairs -= 0.0 if gaps is None else float((gaps[:, 1] - gaps[:, 0]).sum())
    return passes * 2.0 * pairs * q.shape[1] * q.shape[2], _touched(arguments, result)


def _stored(arguments: Arguments, result: Any) -> Work:
    return 0.0, 2.0 * (_nbytes(arguments["k_TND"]) + _nbytes(arguments["v_TND"]))


def _in_place(arguments: Arguments, result: Any) -> Work:
    return 0.0, 2.0 * _nbytes(next(iter(arguments.values())))


WORK: dict[str, Callable[[Arguments, Any], Work]] = {
    "base linear": _product,
    "base linear, dx": _product,
    "lora_forward_": _lora_forward,
    "lora_backward": _lora_backward,
    "kv_store": _stored,
    "apply_rope_": _in_place,
    "logit_gradient_": _in_place,
    "paged_attention": _paged,
    "window_attention": lambda arguments, result: _window(arguments, result, 2.0),
    "window_attention_backward": lambda arguments, result: _window(arguments, result, 5.0),
}


@dataclass
class Entry:
    """Sums of one operation: calls, seconds outside nested operations, arithmetic, bytes."""

    calls: int = 0
    seconds: float = 0.0
    flop: float = 0.0
    moved: float = 0.0


@dataclass
class Ledger:
    """Entries by operation, and the events of a Chrome trace (name, begin and length in seconds)."""

    entries: dict[str, Entry] = field(default_factory=lambda: defaultdict(Entry))
    events: list[tuple[str, float, float]] = field(default_factory=list)
    overhead: float = 0.0  # seconds spent on counting, between operations
    _nested: list[float] = field(default_factory=list)

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` under the stopwatch. Counting the work is kept out of the measured time."""
        signature = inspect.signature(function)
        work = WORK.get(name, lambda arguments, result: (0.0, _touched(arguments, result)))

        @functools.wraps(function)
        def run(*words: Any, **named: Any) -> Any:
            self._nested.append(0.0)
            began = time.perf_counter()
            result = function(*words, **named)
            seconds = time.perf_counter() - began
            inner = self._nested.pop()
            entry = self.entries[name]
            entry.calls += 1
            entry.seconds += seconds - inner
            flop, moved = work(signature.bind(*words, **named).arguments, result)
            entry.flop += flop
            entry.moved += moved
            self.events.append((name, began, seconds))
            counting = time.perf_counter() - began - seconds
            if self._nested:
                self._nested[-1] += seconds + counting
            self.overhead += counting
            return result

        return run

    @property
    def seconds(self) -> float:
        """Of all operations together."""
        return sum(entry.seconds for entry in self.entries.values())

    def trace(self) -> dict[str, Any]:
        """The events in the format that chrome://tracing and Perfetto read, microseconds."""
        origin = min((begin for _, begin, _ in self.events), default=0.0)
        return {
            "displayTimeUnit": "ms",
            "traceEvents": [
                {"name": n, "ph": "X", "ts": (b - origin) * 1e6, "dur": s * 1e6, "pid": 1, "tid": 1}
                for n, b, s in self.events
            ],
        }


@contextmanager
def installed(ledger: Ledger) -> Iterator[Ledger]:
    """Run the block with every operation under `ledger`'s stopwatch."""
    undo: list[tuple[Any, str, Any]] = []

    def replace(owner: Any, attribute: str, timed: Any) -> None:
        undo.append((owner, attribute, getattr(owner, attribute)))
        setattr(owner, attribute, timed)

    # A tape's calls pass no stopwatch.
    replace(StandingBatches, "takes", lambda batches, spans: False)
    for attribute, name in (("forward", "base linear"), ("backward_input", "base linear, dx")):
        replace(PackedLinear, attribute, ledger.timed(name, getattr(PackedLinear, attribute)))
    for module_name, functions in KERNELS.items():
        home = importlib.import_module(f"coserve.kernels.{module_name}")
        for name in functions:
            plain = getattr(home, name)
            timed = ledger.timed(name, plain)
            for module in _importers(plain, name):
                replace(module, name, timed)
    try:
        yield ledger
    finally:
        for owner, attribute, plain in reversed(undo):
            setattr(owner, attribute, plain)


def _importers(function: Any, name: str) -> list[ModuleType]:
    """The project's modules and the program's that call the function by this name, its home among them."""
    ours = ("coserve.", "__main__", "kernels_attention")
    modules = [m for n, m in sys.modules.items() if n.startswith(ours) and m is not None]
    return [module for module in modules if getattr(module, name, None) is function]
