"""The head's units, a chunk of trained tokens at a time: no T x V logits, and dL/dx left behind.

score:  logp = log softmax(head(norm(x)))[target]
loss:   the same, then dx = norm'(dlogits W) with dlogits from the objective's weights
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from coserve.core.training_sequence import TrainingUnit
from coserve.kernels.cross_entropy import TokenScores, logit_gradient_, token_scores
from coserve.kernels.dropout import Dropout
from coserve.kernels.lora import ModuleGradient
from coserve.layers.batch import HeadAdapter
from coserve.layers.lm_head import HeadRun
from coserve.layers.pieces import Pieces
from coserve.models.decoder import Decoder
from coserve.training.microbatch import Microbatch
from coserve.training.objectives import ROWS, Chunk, Objective, split
from coserve.training.unit_calls import UnitCalls


def score_chunk(
    decoder: Decoder,
    microbatch: Microbatch,
    chunk: Chunk,
    *,
    reference: bool = False,
    head: HeadAdapter | None = None,
    dropout: Dropout | None = None,
) -> Pieces[None]:
    """Log-probabilities of a chunk into the microbatch: those of the reference, or the adapter's own. In
    pieces. `head` is the adapter's part of the head, `dropout` that of the chunk's tokens there."""
    rows = microbatch.trained_rows[chunk.start : chunk.end]
    runs = () if head is None else (HeadRun(0, len(rows), head, dropout),)
    logits_CV = yield from decoder.head_forward(microbatch.saved.x_out_TH[rows], runs)
    scores = token_scores(logits_CV, microbatch.targets_T[rows])
    if reference:
        microbatch.reference_T[rows] = scores.logprob_C
    else:
        _keep(microbatch, rows, scores)
        _wide_scores(microbatch, rows, logits_CV, scores.lse_C)


def loss_chunk(
    decoder: Decoder,
    microbatch: Microbatch,
    chunk: Chunk,
    objective: Objective,
    grad_scale: float,
    *,
    head: ModuleGradient | None = None,
    needs_input: bool = True,
) -> Pieces[None]:
    """Scores of a chunk, and the gradient w.r.t. the last layer's output, times `grad_scale`, into its rows
    of `dh_TH`; unless only the head is trained (not `needs_input`). The gradients of the adapter's part of
    the `head` are added to its sums. In pieces; what is added to gradients is in the last."""
    saved = microbatch.saved
    rows = microbatch.trained_rows[chunk.start : chunk.end]
    x_CH, targets_C = saved.x_out_TH[rows], microbatch.targets_T[rows]
    runs = () if head is None else (HeadRun(0, len(rows), HeadAdapter(head.a_RK, head.b_RN), head.dropout),)
    logits_CV = yield from decoder.head_forward(x_CH, runs)
    scores = token_scores(logits_CV, targets_C)
    _keep(microbatch, rows, scores)
    wide_CK = _wide_scores(microbatch, rows, logits_CV, scores.lse_C)
    yield
    weight_C, uniform_C = objective.weights(microbatch, rows)
    logit_gradient_(
        logits_CV,
        targets_C,
        scores.lse_C,
        weight_C * grad_scale,
        uniform_C * grad_scale,
        decoder.config.logit_cap,
    )
    if wide_CK is not None:
        _wide_gradient_(logits_CV, microbatch, rows, wide_CK, weight_C, grad_scale, decoder.config.logit_cap)
    yield
    dx_CH = yield from decoder.head_backward(logits_CV, x_CH, head, chunk.start, needs_input)
    if dx_CH is not None:
        saved.dh_TH[rows] = dx_CH


def _keep(microbatch: Microbatch, rows: torch.Tensor, scores: TokenScores) -> None:
    microbatch.logprobs_T[rows] = scores.logprob_C
    microbatch.mean_logprobs_T[rows] = scores.mean_logprob_C
    microbatch.greedy_T[rows] = scores.greedy_C


def _wide_scores(
    microbatch: Microbatch, rows: torch.Tensor, logits_CV: torch.Tensor, lse_C: torch.Tensor
) -> torch.Tensor | None:
    """Log-probabilities of a chunk's several targets into the microbatch; their logits, fp32 [C, K]. None
    where each token has one."""
    if microbatch.wide_targets_TK is None:
        return None
    wide_CK = logits_CV.gather(1, microbatch.wide_targets_TK[rows]).float()
    microbatch.wide_logprobs_TK[rows] = wide_CK - lse_C[:, None]
    return wide_CK


def _wide_gradient_(
    gradient_CV: torch.Tensor,
    microbatch: Microbatch,
    rows: torch.Tensor,
    wide_CK: torch.Tensor,
    weight_C: torch.Tensor,
    grad_scale: float,
    soft_cap: float,
) -> None:
    """From the gradient of the first target with the sum of all weights (`weight_C`) to that of all with
    their own: dz = sum_k w_k (p - onehot_k), so only the targets' own places differ. `wide_CK` are their
    logits."""
    assert microbatch.wide_targets_TK is not None
    targets_CK = microbatch.wide_targets_TK[rows]
    share_CK = microbatch.wide_logprobs_TK[rows].exp() * weight_C[:, None]
    own_CK = microbatch.wide_weights_TK[rows]
    if soft_cap:
        slope_CK = 1.0 - (wide_CK / soft_cap).square()
        share_CK, own_CK = share_CK * slope_CK, own_CK * slope_CK
    gradient_CV.scatter_(1, targets_CK, (share_CK * grad_scale).to(gradient_CV.dtype))
    gradient_CV.scatter_add_(1, targets_CK, (-own_CK * grad_scale).to(gradient_CV.dtype))


def head_units(kind: str, chunks: Sequence[Chunk], tile: int = 1) -> tuple[TrainingUnit, ...]:
    """The units of chunks given last to first; neighbours that meet at a multiple of `tile` join."""
    units = []
    above: Chunk | None = None
    for chunk in chunks:
        joins = above is not None and chunk.end == above.start and chunk.end % tile == 0
        units.append(TrainingUnit(kind, chunk.end - chunk.start, joins=joins))
        above = chunk
    return tuple(units)


def score_units(microbatch: Microbatch) -> tuple[TrainingUnit, ...]:
    """The units of a pass that only scores. ValueError for a microbatch without trained tokens."""
    if microbatch.num_trained == 0:
        raise ValueError("a microbatch without trained tokens has nothing to score")
    return head_units("score", split(0, microbatch.num_trained, ROWS)[::-1])


class MicrobatchScoring(UnitCalls):
    """Runs the units of a scoring pass, last to first. `reference`: the forward was the reference's. `head`
    is the pass's adapter's part of the head."""

    def __init__(
        self,
        decoder: Decoder,
        microbatch: Microbatch,
        *,
        reference: bool = False,
        head: HeadAdapter | None = None,
    ) -> None:
        super().__init__()
        self._decoder, self._microbatch, self._reference = decoder, microbatch, reference
        self._head = head
        self._chunks = split(0, microbatch.num_trained, ROWS)[::-1]

    @property
    def done(self) -> bool:
        """All trained tokens have log-probabilities."""
        return self.cursor == len(self._chunks)

    def _pieces(self, length: int) -> Iterator[None]:
        chunks = self._chunks[self.cursor : self.cursor + length]
        if not chunks or len(chunks) < length:
            raise IndexError(f"{len(chunks)} units of the pass are left, not {length}")
        chunk = Chunk(chunks[-1].start, chunks[0].end)
        yield from score_chunk(
            self._decoder, self._microbatch, chunk, reference=self._reference, head=self._head
        )
