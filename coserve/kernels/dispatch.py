"""Which implementation an operation runs on: C++ for CPU tensors, Triton for CUDA tensors, torch for oracles.

`native` is the compiled module or None. It is loaded once, after torch, so that both share one pool of
OpenMP threads: the module names no OpenMP library of its own and takes the one that torch has loaded.
"""

from __future__ import annotations

import ctypes
import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeVar, cast, get_args

import torch

from coserve.errors import ConfigError

Operation = TypeVar("Operation", bound=Callable[..., Any])
Backend = Literal["reference", "auto", "triton"]
ISA_LEVELS = ("plain", "avx2", "avx512", "avx512bf16", "amx")
CPU = torch.device("cpu")
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}


def _openmp_runtime() -> str:
    """Path of the libgomp that torch brings; the system's by name where torch has none."""
    site = Path(torch.__file__).parent
    for folder in (site / "lib", site.parent / "torch.libs"):
        for path in sorted(folder.glob("libgomp*.so*")):
            return str(path)
    return "libgomp.so.1"


def _load() -> ModuleType | None:
    try:
        ctypes.CDLL(_openmp_runtime(), mode=ctypes.RTLD_GLOBAL)
        return importlib.import_module("coserve.kernels._native")
    except (ImportError, OSError):
        return None


native: ModuleType | None = _load()
_backend: Backend = "auto"
_batch_invariant = False


@contextmanager
def use_backend(name: Backend) -> Iterator[None]:
    """Run the block on the torch references ("reference"), on what the device has ("auto"), or on Triton's
    interpreter ("triton": CPU tensors too, in a process started with TRITON_INTERPRET=1)."""
    global _backend
    if name not in get_args(Backend):
        raise ValueError(f"unknown backend {name!r}: use one of {', '.join(get_args(Backend))}")
    if name == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("Triton runs on CPU tensors in its interpreter alone: set TRITON_INTERPRET=1 first")
    before, _backend = _backend, name
    try:
        yield
    finally:
        _backend = before


def set_batch_invariant(wanted: bool) -> None:
    """Whether a GPU's products must give a row the same bits in every batch (`--deterministic`)."""
    global _batch_invariant
    _batch_invariant = wanted


def batch_invariant() -> bool:
    """What `set_batch_invariant` was told. A CPU's products don't ask: they always are."""
    return _batch_invariant


def native_for(x: torch.Tensor) -> ModuleType | None:
    """The compiled module if `x` is a CPU tensor of fp32 or bf16 and the C++ path is on, else None."""
    if native is not None and _backend == "auto" and x.is_cpu and x.dtype in DTYPE_CODES:
        return native
    return None


def triton_or_reference(x: torch.Tensor, reference: Operation) -> Operation:
    """What runs where the C++ doesn't: `reference`, or on CUDA tensors such as `x` the Triton kernel for it.

    `_name_reference` of kernels/file.py has its kernel as `name` in kernels/triton/file.py, with the same
    arguments. ConfigError for CUDA tensors without triton: the references are never run in its place unasked.
    """
    wanted = _backend == "triton" or (_backend == "auto" and x.is_cuda)
    if not wanted or x.dtype == torch.float64:
        return reference
    return cast(Operation, _triton_kernel(reference))


@cache
def _triton_kernel(reference: Callable[..., Any]) -> Callable[..., Any]:
    if find_spec("triton") is None:
        raise ConfigError("CUDA needs the package triton, which is not installed; use --device cpu.")
    file = reference.__module__.rpartition(".")[2]
    name = reference.__name__.removeprefix("_").replace("_reference", "")
    kernel: Callable[..., Any] = getattr(importlib.import_module(f"coserve.kernels.triton.{file}"), name)
    return kernel


@contextmanager
def native_replaced(module: ModuleType) -> Iterator[None]:
    """`module` stands in for the compiled one inside the block: kernels/tape.py listens to its calls."""
    global native
    before, native = native, module
    try:
        yield
    finally:
        native = before


def isa() -> str:
    """The instruction set that the C++ kernels use now: one of ISA_LEVELS, or "none" without the module."""
    return "none" if native is None else ISA_LEVELS[native.get_isa()]


@contextmanager
def use_isa(level: str) -> Iterator[None]:
    """Run the block's C++ kernels on a lower instruction set; ValueError if this CPU lacks it."""
    if native is None or level not in ISA_LEVELS:
        raise ValueError(f"instruction set {level!r} is unknown or the compiled module is missing")
    before = native.get_isa()
    if ISA_LEVELS.index(level) > native.max_isa():
        raise ValueError(f"this CPU does not support {level}")
    native.set_isa(ISA_LEVELS.index(level))
    try:
        yield
    finally:
        native.set_isa(before)


def require(condition: bool, message: str) -> None:
    """ValueError with `message` unless `condition`."""
    if not condition:
        raise ValueError(message)


def require_like(x: torch.Tensor, /, *, contiguous: bool = False, **others: torch.Tensor) -> None:
    """Each of `others` must have x's dtype, be on the CPU and be contiguous in all but its first dimension.

    `contiguous` asks it of the first dimension too. Size-one dimensions don't count.
    """
    for name, other in others.items():
        if other.dtype != x.dtype or not other.is_cpu:
            raise ValueError(f"{name} is {other.dtype} on {other.device}, expected {x.dtype} on the CPU")
        if not other.is_contiguous() and (contiguous or not _rows_contiguous(other)):
            raise ValueError(
                f"{name} of strides {other.stride()} is not contiguous; call .contiguous() first"
            )


def require_flat(param: torch.Tensor, /, **others: torch.Tensor) -> None:
    """An optimizer's buffers: `param` and each of `others` must be contiguous fp32 of its shape."""
    for name, tensor in {"param": param, **others}.items():
        require(
            tensor.dtype == torch.float32 and tensor.is_contiguous() and tensor.shape == param.shape,
            f"{name} must be contiguous fp32 with {param.numel()} elements",
        )


def require_index(dtype: torch.dtype, device: torch.device = CPU, /, **tensors: torch.Tensor) -> None:
    """Each tensor must be contiguous, of the integer `dtype`, on `device`."""
    for name, tensor in tensors.items():
        if tensor.dtype != dtype or tensor.device != device or not tensor.is_contiguous():
            raise ValueError(
                f"{name} is {tensor.dtype} of strides {tensor.stride()} on {tensor.device}, "
                f"expected contiguous {dtype} on {device}"
            )


def _rows_contiguous(x: torch.Tensor) -> bool:
    expected = 1
    for size, stride in zip(reversed(x.shape[1:]), reversed(x.stride()[1:]), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def is_index(x: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether `x` is a contiguous CPU tensor of the integer `dtype`."""
    return x.dtype is dtype and x.is_contiguous() and x.is_cpu


def wide(x: torch.Tensor) -> torch.Tensor:
    """`x` in the type that statistics are kept in: fp32 (float64 stays, for oracles)."""
    return x if x.dtype == torch.float64 else x.float()
