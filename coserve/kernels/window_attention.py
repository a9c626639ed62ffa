"""Causal attention inside the samples of a packed microbatch, window by window, and its backward.

Query i of a window stands at stream index t = window_start + i and sees keys first_key[i] .. t, from its
sample's start on or, with a sliding window, from later; but for its gap [gaps[i, 0], gaps[i, 1]), what lies
between a prefix that its sample shares with others (Juravsky et al. 2024) and the rest of the sample:

    s = scale * q . k,   p = exp(s - lse),   o = sum p v,   lse = log sum exp(s)
    dv += p do,   ds = p * (do . v - do . o),   dq = scale * sum ds k,   dk += scale * ds q

A soft cap c turns s into z = c * tanh(s / c) (Gemma 2), and then ds has the factor 1 - (z / c)^2.

Keys are cut into blocks of 64 anchored at stream index 0 (Dao et al. 2022). The backward adds tiles of 64
queries, anchored there too, last to first: a microbatch cut into windows at multiples of 64 and run backward
from its last window gives the same bits as whole.
"""

from __future__ import annotations

import torch

from coserve.kernels.dispatch import (
    DTYPE_CODES,
    native_for,
    require,
    require_index,
    require_like,
    triton_or_reference,
    wide,
)

TILE = 64


def window_attention(
    q_WND: torch.Tensor,
    k_TND: torch.Tensor,
    v_TND: torch.Tensor,
    first_key_W: torch.Tensor,
    window_start: int,
    scale: float,
    soft_cap: float = 0.0,
    gaps_W2: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(o [W, N, D] in q's dtype, lse [W, N] fp32)`.

    `k`, `v` [T, Nkv, D] hold the microbatch's stream, valid up to the window's end; `first_key` [W], `gaps`
    [W, 2] int32 (None: nobody has one); `soft_cap` 0 is none.
    """
    native = native_for(q_WND)
    if native is None:
        return triton_or_reference(q_WND, _window_attention_reference)(
            q_WND, k_TND, v_TND, first_key_W, window_start, scale, soft_cap, gaps_W2
        )
    W, N, D = q_WND.shape
    _check(q_WND, k_TND, v_TND, first_key_W, window_start, scale, gaps_W2)
    o_WND = torch.empty(q_WND.shape, dtype=q_WND.dtype)
    lse_WN = torch.empty((W, N), dtype=torch.float32)
    native.window_attention(
        DTYPE_CODES[q_WND.dtype],
        q_WND.data_ptr(),
        q_WND.stride(0),
        k_TND.data_ptr(),
        k_TND.stride(0),
        v_TND.data_ptr(),
        v_TND.stride(0),
        first_key_W.data_ptr(),
        0 if gaps_W2 is None else gaps_W2.data_ptr(),
        window_start,
        W,
        N,
        k_TND.shape[1],
        D,
        scale,
        soft_cap,
        o_WND.data_ptr(),
        lse_WN.data_ptr(),
    )
    return o_WND, lse_WN


def window_attention_backward(
    do_WND: torch.Tensor,
    q_WND: torch.Tensor,
    o_WND: torch.Tensor,
    lse_WN: torch.Tensor,
    k_TND: torch.Tensor,
    v_TND: torch.Tensor,
    first_key_W: torch.Tensor,
    window_start: int,
    scale: float,
    dk_TND: torch.Tensor,
    dv_TND: torch.Tensor,
    soft_cap: float = 0.0,
    gaps_W2: torch.Tensor | None = None,
) -> torch.Tensor:
    """Gradient w.r.t. the window's `q`, in its dtype; adds those of all keys it sees into fp32 `dk`, `dv`."""
    native = native_for(q_WND)
    if native is None:
        return triton_or_reference(q_WND, _window_attention_backward_reference)(
            do_WND,
            q_WND,
            o_WND,
            lse_WN,
            k_TND,
            v_TND,
            first_key_W,
            window_start,
            scale,
            dk_TND,
            dv_TND,
            soft_cap,
            gaps_W2,
        )
    W, N, D = q_WND.shape
    _check(q_WND, k_TND, v_TND, first_key_W, window_start, scale, gaps_W2)
    require_like(q_WND, do=do_WND, o=o_WND)
    require(do_WND.shape == q_WND.shape and o_WND.shape == q_WND.shape, "do, o and q differ in shape")
    require(lse_WN.shape == (W, N) and lse_WN.is_contiguous(), f"lse must be contiguous [{W}, {N}]")
    for name, grad in (("lse", lse_WN), ("dk", dk_TND), ("dv", dv_TND)):
        require(grad.dtype == torch.float32 and grad.is_contiguous(), f"{name} must be contiguous fp32")
    require(dk_TND.shape == k_TND.shape and dv_TND.shape == k_TND.shape, "dk, dv and k differ in shape")
    dq_WND = torch.empty(q_WND.shape, dtype=q_WND.dtype)
    native.window_attention_backward(
        DTYPE_CODES[q_WND.dtype],
        do_WND.data_ptr(),
        do_WND.stride(0),
        q_WND.data_ptr(),
        q_WND.stride(0),
        o_WND.data_ptr(),
        o_WND.stride(0),
        lse_WN.data_ptr(),
        k_TND.data_ptr(),
        k_TND.stride(0),
        v_TND.data_ptr(),
        v_TND.stride(0),
        first_key_W.data_ptr(),
        0 if gaps_W2 is None else gaps_W2.data_ptr(),
        window_start,
        W,
        N,
        k_TND.shape[1],
        D,
        scale,
        soft_cap,
        dk_TND.data_ptr(),
        dv_TND.data_ptr(),
        dq_WND.data_ptr(),
    )
    return dq_WND


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    first_key: torch.Tensor,
    window_start: int,
    scale: float,
    gaps: torch.Tensor | None,
) -> None:
    require(scale > 0, f"scale must be positive, not {scale}")
    require_like(q, q=q, k=k, v=v)
    require_index(torch.int32, first_key=first_key)
    if gaps is not None:
        require_index(torch.int32, gaps=gaps)
        require(gaps.shape == (len(q), 2), f"gaps must be [{len(q)}, 2], not {list(gaps.shape)}")
    require(k.shape == v.shape and k.shape[2] == q.shape[2], "k, v and q differ in shape")
    require(
        q.shape[1] % k.shape[1] == 0, f"{q.shape[1]} query heads are no multiple of {k.shape[1]} KV heads"
    )
    require(len(first_key) == len(q), f"{len(first_key)} sample starts for {len(q)} queries")
    require(window_start + len(q) <= len(k), f"the window ends at {window_start + len(q)}, k at {len(k)}")


def _hidden_keys(first_key: torch.Tensor, gaps: torch.Tensor | None, first: int, end: int) -> torch.Tensor:
    """[W, end] bool: keys that the queries at stream index first, first + 1, ... do not see."""
    key = torch.arange(end, device=first_key.device)[None, :]
    position = torch.arange(first, first + len(first_key), device=first_key.device)[:, None]
    hidden = (key > position) | (key < first_key[:, None])
    return hidden if gaps is None else hidden | ((key >= gaps[:, :1]) & (key < gaps[:, 1:]))


def _window_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    first_key: torch.Tensor,
    window_start: int,
    scale: float,
    soft_cap: float,
    gaps: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    end, group = window_start + len(q), q.shape[1] // k.shape[1]
    kf = wide(k[:end]).repeat_interleave(group, 1)
    vf = wide(v[:end]).repeat_interleave(group, 1)
    scores = torch.einsum("wnd,jnd->nwj", wide(q), kf) * scale
    if soft_cap:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    scores = scores.masked_fill(_hidden_keys(first_key, gaps, window_start, end), float("-inf"))
    lse = scores.logsumexp(-1)
    out = torch.einsum("nwj,jnd->wnd", torch.exp(scores - lse[..., None]), vf)
    return out.to(q.dtype), lse.t().contiguous()


def _window_attention_backward_reference(
    do: torch.Tensor,
    q: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    first_key: torch.Tensor,
    window_start: int,
    scale: float,
    dk: torch.Tensor,
    dv: torch.Tensor,
    soft_cap: float,
    gaps: torch.Tensor | None,
) -> torch.Tensor:
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    end, kv_heads = window_start + len(q), k.shape[1]
    group = q.shape[1] // kv_heads
    for tile in reversed(range(window_start // TILE, -(-end // TILE))):
        first, last = max(tile * TILE, window_start), min((tile + 1) * TILE, end)
        rows = slice(first - window_start, last - window_start)
        kf = wide(k[:last]).repeat_interleave(group, 1)
        vf = wide(v[:last]).repeat_interleave(group, 1)
        qf, dof = wide(q[rows]), wide(do[rows])
        scores, slope = torch.einsum("wnd,jnd->nwj", qf, kf) * scale, scale
        if soft_cap:
            turned = torch.tanh(scores / soft_cap)
            scores, slope = soft_cap * turned, scale * (1 - turned.square())
        p = torch.exp(scores - wide(lse[rows]).t()[..., None])
        own_gaps = None if gaps is None else gaps[rows]
        p = p.masked_fill(_hidden_keys(first_key[rows], own_gaps, first, last), 0.0)
        delta = (dof * wide(o[rows])).sum(-1).t()[..., None]
        ds = p * (torch.einsum("wnd,jnd->nwj", dof, vf) - delta) * slope
        dq[rows] = torch.einsum("nwj,jnd->wnd", ds, kf).to(q.dtype)
        heads = (last, kv_heads, group, q.shape[2])
        dk[:last] += torch.einsum("nwj,wnd->jnd", ds, qf).view(heads).sum(2)
        dv[:last] += torch.einsum("nwj,wnd->jnd", p, dof).view(heads).sum(2)
    return dq
