"""End tokens that a base model never learnt: an adapter on its blocks can hardly teach them.

A base checkpoint may carry a chat template whose end-of-turn token was never trained; its row of the head is
then far smaller than the others', and a chat fine-tune of it never stops (Qwen3#1064).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from coserve.kernels.linear import PackedLinear

SMALL = 0.25  # of the median row's norm
LOOKED_AT = 1 << 16  # labels, and rows of the head


def untrained_end_tokens(
    head: PackedLinear, eos_token_ids: Sequence[int], labels: np.ndarray
) -> list[int]:
    """Those of `eos_token_ids` that the first `labels` train although their row of the head is tiny."""
    wanted = [token for token in eos_token_ids if token < head.out_features]
    wanted = [token for token in wanted if bool((labels[:LOOKED_AT] == token).any())]
    if not wanted:
        return []
    step = -(-head.out_features // LOOKED_AT)
    median = float(_norms(head, torch.arange(0, head.out_features, step)).median())
    sizes = _norms(head, torch.tensor(wanted)).tolist()
    return [token for token, size in zip(wanted, sizes, strict=True) if size < SMALL * median]


def _norms(head: PackedLinear, ids: torch.Tensor) -> torch.Tensor:
    return head.rows(ids.to(head.device)).float().norm(dim=1)


def warning(tokens: Sequence[int]) -> str:
    """What is to be said of them."""
    named = ", ".join(map(str, tokens))
    return (
        f"The base model seems never to have learnt the end token {named}: its row of the head is tiny, so "
        "answers may not stop. Add lm_head to the target modules, or use a template with another end token."
    )
