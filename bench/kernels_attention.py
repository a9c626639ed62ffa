"""Cases of bench/kernels.py: attention over the paged cache and over training windows, and sampling."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F

from coserve.core.sampling_params import SamplingParams
from coserve.kernels.paged_attention import paged_attention
from coserve.kernels.window_attention import window_attention, window_attention_backward
from coserve.worker.sampler import SamplingRow, sample

HEADS, KV_HEADS, DIM, VOCAB, BLOCK = 14, 2, 64, 151936, 16
SCALE = DIM**-0.5
COLD = 64 << 20  # bytes of caches that runs go through in turn, as a model's layers do

Case = tuple[str, dict[str, Any], Callable[[], Any], Callable[[], Any]]


def _caches(sequences: int, context: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Caches of several layers [layers, 2, B, ...] and the sequences' tables, blocks in random order."""
    blocks = context // BLOCK
    row = KV_HEADS * DIM * dtype.itemsize
    layers = max(1, COLD // (2 * sequences * context * row))
    cache = torch.empty(layers, 2, sequences * blocks, BLOCK, KV_HEADS, DIM, dtype=dtype).normal_()
    return cache, torch.randperm(sequences * blocks).int().view(sequences, blocks)


def decoding() -> Iterator[Case]:
    """One query a sequence beside sdpa over contiguous keys; fp32 at one size."""
    sizes = [(s, n) for s in (1, 8, 32) for n in (128, 1024, 8192)] + [(1, 32768)]
    for dtype, some in ((torch.bfloat16, sizes), (torch.float32, [(8, 1024)])):
        for sequences, context in some:
            cache, table = _caches(sequences, context, dtype)
            q = torch.randn(sequences, HEADS, DIM).to(dtype)
            starts = torch.arange(sequences + 1, dtype=torch.int32)
            lengths = torch.full((sequences,), context, dtype=torch.int32)
            k, v = torch.randn(2, sequences, KV_HEADS, context, DIM).to(dtype)
            turn = count()

            def ours(q=q, c=cache, t=table, s=starts, n=lengths, turn=turn) -> torch.Tensor:
                layer = c[next(turn) % len(c)]
                return paged_attention(q, layer[0], layer[1], t, s, n, SCALE)

            load = {"dtype": str(dtype)[6:], "sequences": sequences, "context": context}
            yield (
                "paged_decode",
                load,
                ours,
                lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True),
            )


def prefill() -> Iterator[Case]:
    """A prompt's chunk at the end of its context."""
    for dtype, tokens, context in (
        (torch.bfloat16, 512, 512),
        (torch.bfloat16, 256, 2048),
        (torch.float32, 512, 512),
    ):
        cache, table = _caches(1, context, dtype)
        q = torch.randn(tokens, HEADS, DIM).to(dtype)
        bounds = [torch.tensor(n, dtype=torch.int32) for n in ([0, tokens], [context])]
        k, v = torch.randn(2, 1, KV_HEADS, context, DIM).to(dtype)
        heads_first = q.transpose(0, 1)[None].contiguous()
        mask = torch.ones(tokens, context, dtype=torch.bool).tril(context - tokens)
        load = {"dtype": str(dtype)[6:], "tokens": tokens, "context": context}
        yield (
            "paged_prefill",
            load,
            lambda q=q, c=cache[0], t=table, b=bounds: paged_attention(q, c[0], c[1], t, *b, SCALE),
            lambda q=heads_first, k=k, v=v, m=mask: F.scaled_dot_product_attention(
                q, k, v, attn_mask=m, enable_gqa=True
            ),
        )


def windows() -> Iterator[Case]:
    """A training window, both ways, beside sdpa and its autograd."""
    for dtype, tokens in ((torch.float32, 512), (torch.bfloat16, 512), (torch.bfloat16, 2048)):
        q, do = (torch.randn(tokens, HEADS, DIM).to(dtype) for _ in range(2))
        k, v = (torch.randn(tokens, KV_HEADS, DIM).to(dtype) for _ in range(2))
        start = torch.zeros(tokens, dtype=torch.int32)
        o, lse = window_attention(q, k, v, start, 0, SCALE)
        dk, dv = torch.zeros(2, tokens, KV_HEADS, DIM)
        heads_first = [t.transpose(0, 1)[None].contiguous() for t in (q, k, v)]
        leaves = [t.clone().requires_grad_() for t in heads_first]
        with torch.enable_grad():
            result = F.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)
        gradient = do.transpose(0, 1)[None].contiguous()
        load = {"dtype": str(dtype)[6:], "tokens": tokens}
        yield (
            "window_attention",
            load,
            lambda q=q, k=k, v=v, s=start: window_attention(q, k, v, s, 0, SCALE),
            lambda h=heads_first: F.scaled_dot_product_attention(*h, is_causal=True, enable_gqa=True),
        )
        yield (
            "window_attention_backward",
            load,
            lambda do=do, q=q, o=o, lse=lse, k=k, v=v, s=start, dk=dk, dv=dv: window_attention_backward(
                do, q, o, lse, k, v, s, 0, SCALE, dk, dv
            ),
            lambda r=result, x=leaves, g=gradient: torch.autograd.grad(r, x, g, retain_graph=True),
        )


def _drawn(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """What a plain torch sampler does: softmax, a sort where top_p is asked for, multinomial."""
    p = logits.float().softmax(-1)
    if top_p == 1.0:
        return p.multinomial(1)
    p, order = p.sort(-1, descending=True)
    p[p.cumsum(-1) - p >= top_p] = 0.0
    return order.gather(-1, p.multinomial(1))


def sampling() -> Iterator[Case]:
    """Tokens from rows of bf16 logits, fifty of them likely, through the worker's sampler."""
    for rows in (8, 32):
        logits = 2.5 * torch.randn(rows, VOCAB)
        logits[:, :50] += 9.0
        logits = logits.bfloat16()
        for name, settings, peer in (
            ("greedy", {"temperature": 0.0}, lambda z=logits: z.argmax(-1)),
            ("open", {}, lambda z=logits: _drawn(z, 1.0)),
            ("top_p 0.95", {"top_p": 0.95}, lambda z=logits: _drawn(z, 0.95)),
            (
                "top_k 50, top_p 0.95",
                {"top_k": 50, "top_p": 0.95},
                lambda z=logits: _drawn(z.topk(50)[0], 0.95),
            ),
            (
                "greedy, 5 logprobs",
                {"temperature": 0.0, "logprobs": 5},
                lambda z=logits: z.float().log_softmax(-1).topk(5),
            ),
        ):
            asked = [SamplingRow(SamplingParams(seed=i, **settings), range(100), 50) for i in range(rows)]
            load = {"dtype": "bfloat16", "rows": rows, "vocabulary": VOCAB, "settings": name}
            yield (
                "sampling",
                load,
                lambda z=logits, a=asked: sample(z, a),
                peer,
            )
