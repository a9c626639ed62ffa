"""End tokens that a base model never learnt: an adapter on its blocks can hardly teach them.

A base checkpoint may carry a chat template whose end-of-turn token was never trained; its row of the head is
then far smaller than the others', and a chat fine-tune of it never stops (Qwen3#1064).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

SMALL = 0.25  # of the median row's norm
LOOKED_AT = 1 << 16  # labels, and rows of the head


def untrained_end_tokens(
    head_VH: torch.Tensor, eos_token_ids: Sequence[int], labels: np.ndarray
) -> list[int]:
    """Those of `eos_token_ids` that the first `labels` train although their row of the head is tiny."""
    wanted = [token for token in eos_token_ids if token < len(head_VH)]
    wanted = [token for token in wanted if bool((labels[:LOOKED_AT] == token).any())]
    if not wanted:
        return []
    step = -(-len(head_VH) // LOOKED_AT)
    median = float(head_VH[::step].float().norm(dim=1).median())
    return [token for token in wanted if float(head_VH[token].float().norm()) < SMALL * median]


def warning(tokens: Sequence[int]) -> str:
    """What is to be said of them."""
    named = ", ".join(map(str, tokens))
    return (
        f"The base model seems never to have learnt the end token {named}: its row of the head is tiny, so "
        "answers may not stop. Add lm_head to the target modules, or use a template with another end token."
    )
