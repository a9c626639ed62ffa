from pathlib import Path

import pytest
import torch

from coserve.lora.adapter import load_adapter
from coserve.lora.adapter_pool import AdapterPool
from coserve.lora.packed_adapter import pack
from coserve.models.config import LINEAR_MODULES


@pytest.fixture
def pool(config):
    return AdapterPool(config, 12, torch.float32)


def test_rows_hold_a_and_the_scaled_transposed_b(pool, save_adapter, config):
    adapter = load_adapter(save_adapter(r=4, lora_alpha=6), config)
    rows = [7, 2, 9, 0]
    pool.write(rows, adapter)
    for module, name in enumerate(LINEAR_MODULES):
        for layer in range(3):
            weights = adapter.modules[layer, name]
            a, b = pool.rows(module, layer)
            assert torch.equal(a[rows], weights.a_RK)
            assert torch.equal(b[rows], weights.b_NR.t() * 1.5)
            others = [row for row in range(12) if row not in rows]
            assert not a[others].any() and not b[others].any()
    assert (pool.ranks(rows) == 4).all()


def test_smaller_modules_leave_their_rows_zero(pool, save_adapter, config):
    adapter = load_adapter(
        save_adapter(target_modules=["q_proj", "up_proj"], rank_pattern={"up_proj": 1}), config
    )
    for module in range(7):
        for layer in range(3):
            fives = [torch.full_like(tensor, 5.0) for tensor in pool.rows(module, layer)]
            pool.write_module(range(12), module, layer, *fives)
    pool.write([3, 4, 5, 6], adapter)
    up = LINEAR_MODULES.index("up_proj")
    assert pool.ranks([3, 4, 5, 6])[1].tolist() == [4, 0, 0, 0, 0, 1, 0]
    a, b = pool.rows(up, 0)
    assert a[3].any() and not a[4:7].any() and not b[4:7].any()
    untouched, _ = pool.rows(LINEAR_MODULES.index("k_proj"), 2)
    assert not untouched[3:7].any() and (untouched[7:] == 5).all()


def test_reused_rows_hold_nothing_of_the_old_adapter(pool, save_adapter, config):
    pool.write([0, 1, 2, 3], load_adapter(save_adapter(), config))
    small = load_adapter(save_adapter(r=2, target_modules=["k_proj"]), config)
    pool.write([2, 3], small)
    q, _ = pool.rows(0, 0)
    assert not q[2:4].any() and q[:2].any()
    pool.clear([0, 1, 2, 3])
    assert not any(
        tensor.any() for module in range(7) for layer in range(3) for tensor in pool.rows(module, layer)
    )
    for rows in ([0, 1, 2, 3], [2, 3]):
        with pytest.raises(KeyError):
            pool.ranks(rows)


def test_rows_whose_writing_was_given_up_are_cleared_by_the_next(pool, save_adapter, config):
    packed = pack(load_adapter(save_adapter(), config), config, torch.float32)
    pieces = pool.write_pieces([0, 1, 2, 3], packed)
    next(pieces)
    pieces.close()
    assert pool.rows(0, 0)[0][:4].any()
    small = load_adapter(save_adapter(r=2, target_modules=["k_proj"]), config)
    pool.write([2, 3], small)
    assert not pool.rows(0, 0)[0][2:4].any() and pool.rows(1, 0)[0][2:4].any()


def test_the_number_of_rows_must_be_the_rank(pool, save_adapter, config):
    with pytest.raises(ValueError, match="3 rows for an adapter of rank 4"):
        pool.write([0, 1, 2], load_adapter(save_adapter(), config))


def test_size_grows_with_rows_in_the_compute_dtype(config):
    one, two = AdapterPool(config, 1, torch.bfloat16), AdapterPool(config, 2, torch.bfloat16)
    shapes = [config.module_shape(name) for name in LINEAR_MODULES]
    assert one.nbytes == 2 * 3 * sum(out + into for out, into in shapes)
    assert two.nbytes == 2 * one.nbytes
    assert one.rows(0, 0)[0].dtype == torch.bfloat16


def test_packed_adapters_know_their_size(save_adapter, config):
    adapter = load_adapter(save_adapter(r=2, target_modules=["q_proj"]), config)
    assert pack(adapter, config, torch.float32).nbytes == 3 * (2 * 16 + 16 * 2) * 4
    assert pack(adapter, config, torch.bfloat16).nbytes == 3 * (2 * 16 + 16 * 2) * 2


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_rows_that_nobody_wrote_take_no_memory(config):
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident()
    pool = AdapterPool(config, 50_000, torch.float32)
    assert pool.nbytes > 100 << 20
    assert resident() - before < pool.nbytes / 10
    assert not pool.rows(0, 0)[0][5].any()
