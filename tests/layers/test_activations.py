"""Buffers of a microbatch: what is kept where at which level, aligned and apart from each other."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from coserve.layers.activations import LayerActivations
from coserve.models.config import ModelConfig
from coserve.training.activations import ALIGNMENT, MicrobatchActivations

CONFIG = ModelConfig("qwen3", 97, 48, 88, 3, 6, 2, 10, qk_norm=True)


def held(saved: LayerActivations) -> dict[str, torch.Tensor]:
    values = {field.name: getattr(saved, field.name) for field in dataclasses.fields(saved)}
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


def buffers(saved: MicrobatchActivations) -> list[torch.Tensor]:
    found = [saved.x_out_TH, saved.dh_TH, saved.dk_TND, saved.dv_TND]
    for layer in range(CONFIG.num_layers):
        found += held(saved.layer(layer)).values()
    return found


def make(shape: tuple, level: int | None = None) -> tuple[MicrobatchActivations, torch.Tensor, int]:
    sizes = MicrobatchActivations.level_bytes(*shape)
    size = sizes[-1 if level is None else level]
    extent = torch.zeros(size + 2 * ALIGNMENT, dtype=torch.uint8)
    extent = extent[-extent.data_ptr() % ALIGNMENT :]
    return MicrobatchActivations(extent, *shape, level), extent, size


def policy(saved: LayerActivations) -> str:
    """A, B or C by what is there; "-" where no backward comes."""
    if saved.x_in_TH is None:
        return "-"
    return "C" if saved.x_mid_TH is None else "B" if saved.gate_up_T2I is None else "A"


@pytest.mark.parametrize("level", [None, 0, 1, 2, 3])
def test_buffers_lie_apart_inside_the_extent(level: int | None) -> None:
    saved, extent, size = make((CONFIG, 3, 7, torch.bfloat16, 1), level)
    found = buffers(saved)
    for number, buffer in enumerate(found, 1):
        assert buffer.data_ptr() % ALIGNMENT == 0
        assert buffer.is_contiguous()
        buffer.fill_(number)
    for number, buffer in enumerate(found, 1):
        assert bool((buffer == number).all())
    assert not extent[size:].any()


def test_layers_without_backward_keep_keys_and_values_only() -> None:
    saved, _, _ = make((CONFIG, 3, 7, torch.float32, 2))
    assert set(held(saved.layer(0))) == set(held(saved.layer(1))) == {"k_TND", "v_TND"}
    assert policy(saved.layer(2)) == "A"
    assert saved.layer(0).k_TND.shape == (7, 2, 10)
    assert saved.layer(2).lse_TN.dtype is torch.float32


def test_every_level_gives_one_more_layer_one_more_letter() -> None:
    shape = (CONFIG, 3, 7, torch.float32, 1)
    seen = []
    for level in range(len(MicrobatchActivations.level_bytes(*shape))):
        saved, _, _ = make(shape, level)
        seen.append("".join(policy(saved.layer(layer)) for layer in range(3)))
    assert seen == ["-CC", "-BC", "-BB", "-AB", "-AA"]


def test_a_downgrade_gives_up_the_tail_and_leaves_the_rest_where_it_was() -> None:
    shape = (CONFIG, 3, 7, torch.float32, 0)
    sizes = MicrobatchActivations.level_bytes(*shape)
    assert sizes == sorted(set(sizes))
    saved, extent, _ = make(shape)
    for level in reversed(range(len(sizes))):
        saved.downgrade(level)
        fresh, _, _ = make(shape, level)
        assert saved.level == level
        for layer in range(3):
            assert held(saved.layer(layer)).keys() == held(fresh.layer(layer)).keys()
        ends = [b.data_ptr() + b.nbytes - extent.data_ptr() for b in buffers(saved)]
        assert sizes[level] - ALIGNMENT < max(ends) <= sizes[level]


def test_heads_that_are_normed_are_kept_before_their_norm() -> None:
    plain = dataclasses.replace(CONFIG, qk_norm=False)
    names = {name for name, _, _ in LayerActivations.buffers(plain, 7, torch.float32).attention}
    assert names == {"q_TND", "attn_out_TH", "lse_TN", "x_mid_TH"}
    normed = {name for name, _, _ in LayerActivations.buffers(CONFIG, 7, torch.float32).attention}
    assert normed - names == {"qk_raw_TND"} and names - normed == {"q_TND"}


def test_rows_under_recomputation_hold_what_comes_and_leave_the_buffers_alone() -> None:
    saved, _, _ = make((CONFIG, 1, 7, torch.float32, 0), 0)
    whole = saved.layer(0)
    whole.keep(slice(2, 5), x_in_TH=torch.ones(3, 48), q_TND=torch.ones(3, 6, 10))
    assert float(whole.x_in_TH.sum()) == 3 * 48 and whole.q_TND is None
    rows = whole.rows(slice(2, 5))
    made = torch.full((3, 6, 10), 2.0)
    rows.keep(slice(2, 5), q_TND=made)
    assert rows.q_TND is made and whole.q_TND is None
    assert torch.equal(rows.x_in_TH, torch.ones(3, 48)) and rows.k_TND is whole.k_TND


def test_a_producer_may_write_into_the_buffer_itself_unless_it_recomputes() -> None:
    saved, _, _ = make((CONFIG, 1, 7, torch.float32, 0))
    whole = saved.layer(0)
    place = whole.place("gate_up_T2I", slice(2, 5))
    assert place is not None
    place.fill_(3.0)
    assert whole.gate_up_T2I is not None and float(whole.gate_up_T2I.sum()) == 3.0 * 3 * 2 * 88
    assert whole.rows(slice(2, 5)).place("gate_up_T2I", slice(2, 5)) is None
    whole.gate_up_T2I = None
    assert whole.place("gate_up_T2I", slice(2, 5)) is None
