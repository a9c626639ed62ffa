"""A pass over memory that stays where it is, as the list of its kernel calls.

Where every pass has the same shapes, all that Python does between two kernels, slices, checks, allocation,
gives the same addresses each time. So it is done once, under `record`, and after that `Tape.play` makes the
calls alone: 0.3 us each. What CUDA graphs do for a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from coserve.kernels import dispatch

_EMPTY = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty"}
Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


class Tape:
    """Calls in order, and the tensors made between them, which are kept as long as the tape."""

    def __init__(self, calls: list[Call], made: list[torch.Tensor], result: torch.Tensor) -> None:
        self._calls = calls
        self._made = made
        self._result = result

    @property
    def nbytes(self) -> int:
        """Memory that the tape holds."""
        return sum(tensor.nbytes for tensor in self._made)

    def play(self) -> torch.Tensor:
        """Everything again; the result is the same tensor every time."""
        for function, arguments, keywords in self._calls:
            function(*arguments, **keywords)
        return self._result


def record(run: Callable[[], torch.Tensor]) -> Tape | None:
    """`run` as a tape; None when it can't be one.

    `run` must read and write the same memory whenever it is called, and be free to run again. Kernels of the
    compiled module and torch's in-place operations are recorded; operations that make views or empty memory
    need no repeating; any other rules a tape out. Before a tape is given out it is played over spoilt memory
    and must give the bits that `run` gave.
    """
    if dispatch.native is None:
        return None
    recorder = _Recorder(dispatch.native)
    with dispatch.native_replaced(recorder), recorder.watcher:
        result = run()
    if recorder.watcher.refused:
        return None
    tape = Tape(recorder.calls, recorder.watcher.made, result)
    expected = result.clone()
    for tensor in recorder.watcher.made:
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))
    return tape if torch.equal(tape.play(), expected) else None


class _Recorder(ModuleType):
    """The compiled module with an ear on its calls."""

    def __init__(self, native: ModuleType) -> None:
        super().__init__(native.__name__)
        self.calls: list[Call] = []
        self.watcher = _Watcher(self.calls)
        self._native = native

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self._native, name)

        def call(*arguments: Any) -> Any:
            self.calls.append((function, arguments, {}))
            return function(*arguments)

        return call


class _Watcher(TorchDispatchMode):
    """Sees every operation of torch. `refused`: one of them can't be recorded."""

    def __init__(self, calls: list[Call]) -> None:
        super().__init__()
        self.made: list[torch.Tensor] = []
        self.refused = False
        self._calls = calls

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Else torch loads its compiler, seconds and 150 MB, at the first operation that is watched."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        if func._schema.name in _EMPTY:
            self.made.append(made)
        elif func._schema.is_mutable:
            self._calls.append((_method(func), args, kwargs))
        elif not func.is_view:
            self.refused = True
        return made


def _method(func: Any) -> Callable[..., Any]:
    """An in-place operation as a method of tensors, which is quicker to call."""
    name = func._schema.name.removeprefix("aten::")
    return getattr(torch.Tensor, name) if name.endswith("_") else func
