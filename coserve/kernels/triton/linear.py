"""Products with a frozen weight in which a row has the same bits in every batch (`--deterministic`).

    y = x W^T + b,   dx = dy W

One tile and one instruction whatever the number of rows, and one order of summation: parts of 1024 inputs,
each a chain of multiply-adds from zero, added in ascending order in fp32. Few rows are cut into those parts
over programs, which leave them apart for a second launch to add up; with many rows a program adds up its own.
The bits are the same. cuBLAS, which serves otherwise, picks tiles and splits by the number of rows.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from coserve.kernels.dispatch import require
from coserve.kernels.triton.aot import AotCase
from coserve.kernels.triton.support import cdiv, require_dense, require_rows, require_same
from coserve.kernels.triton.tuning import Tuned

PART = 1024
MANY_PROGRAMS = 128  # from here on tiles alone fill a device
ADD_BLOCK = 1024


def _example(device: torch.device) -> Any:
    x, weight = (torch.randn(rows, 4096, device=device, dtype=torch.bfloat16) for rows in (8, 4096))
    long = torch.randn(2048, 4096, device=device, dtype=torch.bfloat16)
    return lambda: (linear(x, weight, None), linear(long, weight, None), input_gradient(long, weight))


# BLOCK_M stays the same for all: it decides which instruction Hopper and Blackwell use.
CANDIDATES = tuple(
    {"BLOCK_M": 64, "BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}
    for n in (64, 128)
    for k in (32, 64)
    for warps in (4, 8)
    for stages in (3, 4)
)
DEFAULT = {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
TUNED = Tuned("linear", DEFAULT, CANDIDATES, _example)
SINGLE = Tuned("linear_fp32", {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3})


@triton.jit
def _part(x_rows, w_rows, w_in, live, w_live, begin, end, shape: tl.constexpr, BLOCK_K: tl.constexpr):
    acc = tl.zeros(shape, tl.float32)
    for k0 in range(begin, end, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        inside = k < end
        xs = tl.load(x_rows + k[None, :], mask=live[:, None] & inside[None, :], other=0.0)
        ws = tl.load(
            w_rows + k.to(tl.int64)[:, None] * w_in, mask=inside[:, None] & w_live[None, :], other=0.0
        )
        acc = tl.dot(xs, ws, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["M"])
def linear_kernel(
    x, x_stride, w, w_out, w_in, bias, y, M, N, K,
    BIAS: tl.constexpr, APART: tl.constexpr, PART: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`y` [M, N], or with APART fp32 [parts, M, N]; w_out and w_in are the weight's strides."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group, within = tl.program_id(0) // (GROUP * tiles_n), tl.program_id(0) % (GROUP * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    m = (group * GROUP + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = within // height * BLOCK_N + tl.arange(0, BLOCK_N)
    live, n_live = m < M, n < N
    x_rows = x + m.to(tl.int64)[:, None] * x_stride
    w_rows = w + n.to(tl.int64)[None, :] * w_out
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    inside = live[:, None] & n_live[None, :]
    if APART:
        part = tl.program_id(1)
        end = tl.minimum((part + 1) * PART, K)
        acc = _part(x_rows, w_rows, w_in, live, n_live, part * PART, end, (BLOCK_M, BLOCK_N), BLOCK_K)
        tl.store(y + part.to(tl.int64) * M * N + at, acc, mask=inside)
    else:
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for begin in range(0, K, PART):
            end = tl.minimum(begin + PART, K)
            total += _part(x_rows, w_rows, w_in, live, n_live, begin, end, (BLOCK_M, BLOCK_N), BLOCK_K)
        if BIAS:
            total += tl.load(bias + n, mask=n_live, other=0.0).to(tl.float32)[None, :]
        tl.store(y + at, total.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count", "parts"])
def add_parts_kernel(parts_of, y, bias, count, parts, N, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """y [M, N] of fp32 parts [parts, M, N], count = M N, added in ascending order, and a bias [N]."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    total = tl.load(parts_of + at, mask=inside, other=0.0)
    place = at
    for _ in range(1, parts):
        place += count
        total += tl.load(parts_of + place, mask=inside, other=0.0)
    if BIAS:
        total += tl.load(bias + at % N, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=inside)


def linear(x_TK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None) -> torch.Tensor:
    """y [T, N]; x's row stride is free."""
    require(
        x_TK.shape[1] == weight_NK.shape[1], f"x has {x_TK.shape[1]} columns, weight {weight_NK.shape[1]}"
    )
    if bias_N is not None:
        require_same(x_TK, bias=bias_N)
        require(bias_N.shape == weight_NK.shape[:1], f"bias has {len(bias_N)} values")
    return _multiply(x_TK, weight_NK, len(weight_NK), 0, 1, bias_N)


def input_gradient(dy_TN: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
    """dx [T, K]; dy's row stride is free."""
    require(
        dy_TN.shape[1] == len(weight_NK), f"dy has {dy_TN.shape[1]} columns, weight {len(weight_NK)} rows"
    )
    return _multiply(dy_TN, weight_NK, weight_NK.shape[1], 1, 0, None)


def _multiply(
    x: torch.Tensor, weight: torch.Tensor, N: int, outputs: int, inputs: int, bias: torch.Tensor | None
) -> torch.Tensor:
    """`outputs` and `inputs` are those dimensions of `weight`."""
    (M, K), device = x.shape, x.device
    settings = (SINGLE if x.dtype == torch.float32 else TUNED).on(device)
    require_same(x, weight=weight)
    require_rows(x=x)
    require_dense(weight=weight)
    y = torch.empty((M, N), dtype=x.dtype, device=device)
    if M == 0 or N == 0:
        return y
    tiles_m, parts = cdiv(M, settings["BLOCK_M"]), cdiv(K, PART)
    tiles = tiles_m * cdiv(N, settings["BLOCK_N"])
    apart = parts > 1 and tiles_m == 1 and tiles < MANY_PROGRAMS
    out = torch.empty((parts, M, N), dtype=torch.float32, device=device) if apart else y
    linear_kernel[(tiles, parts if apart else 1)](
        x, x.stride(0), weight, weight.stride(outputs), weight.stride(inputs), bias, out, M, N, K,
        BIAS=bias is not None and not apart, APART=apart, PART=PART, GROUP=8, **settings,
    )  # fmt: skip
    if apart:
        add_parts_kernel[(cdiv(M * N, ADD_BLOCK),)](
            out, y, bias, M * N, parts, N, BIAS=bias is not None, BLOCK=ADD_BLOCK
        )
    return y


def _cases() -> list[AotCase]:
    cases = []
    adding = Tuned("linear_add_parts", {"num_warps": 4, "num_stages": 2})
    for dtype in ("bf16", "fp16", "fp32"):
        x = f"*{dtype}:16"
        sizes = {"x_stride": "i32:16", "M": "i32", "N": "i32:16", "K": "i32:16"}
        for out, inner, apart in (
            ("w_out", "w_in", False),
            ("w_out", "w_in", True),
            ("w_in", "w_out", False),
        ):
            signature = {"x": x, "w": x, "bias": x, "y": "*fp32:16" if apart else x, **sizes, out: "i32:16"}
            how = {inner: 1, "BIAS": not apart, "APART": apart, "PART": PART, "GROUP": 8}
            tuned = SINGLE if dtype == "fp32" else TUNED
            cases.append(AotCase(linear_kernel, signature, how, tuned, hot=dtype == "bf16"))
        parts = {"parts_of": "*fp32:16", "y": x, "bias": x, "count": "i32", "parts": "i32", "N": "i32:16"}
        cases.append(AotCase(add_parts_kernel, parts, {"BIAS": True, "BLOCK": ADD_BLOCK}, adding))
    return cases


AOT_CASES = _cases()
