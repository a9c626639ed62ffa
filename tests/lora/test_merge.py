"""Adapters merged: against PEFT's own merges, and by what must hold of any."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch

from coserve.cli.main import run
from coserve.errors import InvalidRequest, NotFound
from coserve.lora.adapter import load_adapter
from coserve.lora.merge import SourceAdapter, merge, read_source, write_merged
from coserve.lora.peft_files import read_adapter_info
from tests.lora.conftest import ALL, load_base

WEIGHTS = [0.7, -0.4]


@pytest.fixture
def sources(save_adapter) -> list[Path]:
    """Two adapters of different ranks, scales and modules."""
    return [
        save_adapter(r=4, lora_alpha=6, target_modules=ALL, rank_pattern={"q_proj": 2}),
        save_adapter(r=3, lora_alpha=9, target_modules=["q_proj", "down_proj"], use_rslora=True),
    ]


def deltas(source: SourceAdapter) -> dict[str, torch.Tensor]:
    return {path: factors.b_NR @ factors.a_RK for path, factors in source.factors.items()}


def peft_merged(base_dir: Path, sources: list[Path], kind: str, **options) -> dict[str, torch.Tensor]:
    model = peft.PeftModel.from_pretrained(load_base(base_dir), sources[0], adapter_name="a")
    model.load_adapter(sources[1], adapter_name="b")
    model.add_weighted_adapter(["a", "b"], WEIGHTS, "merged", combination_type=kind, **options)
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight") and "merged" in module.lora_A:
            found[name.removeprefix("base_model.model.")] = module.get_delta_weight("merged").detach()
    return found


@pytest.mark.parametrize(
    ("method", "kind", "options"),
    [
        ("linear", "cat", {}),
        ("svd", "svd", {"svd_rank": 3}),
        ("ties", "ties_svd", {"svd_rank": 3, "density": 0.4}),
    ],
)
def test_as_peft_merges(base_dir, config, save_adapter, tmp_path, method, kind, options) -> None:
    same = [save_adapter(r=4, lora_alpha=a, target_modules=ALL, init_lora_weights=False) for a in (6, 2)]
    made = merge(
        [read_source(path) for path in same],
        WEIGHTS,
        method,
        rank=options.get("svd_rank", 0),
        density=options.get("density", 0.5),
    )
    expected = peft_merged(base_dir, same, kind, **options)
    assert made.factors.keys() == expected.keys()
    for path, factors in made.factors.items():
        torch.testing.assert_close(factors.b_NR @ factors.a_RK, expected[path], rtol=1e-4, atol=1e-5)


def test_what_is_written_loads_and_adds_the_sum(base_dir, config, sources, tmp_path) -> None:
    read = [read_source(path) for path in sources]
    write_merged(tmp_path / "merged", merge(read, WEIGHTS, "linear"), "base")
    adapter = load_adapter(tmp_path / "merged", config)
    parts = [deltas(source) for source in read]
    assert adapter.rank == 7
    for (layer, name), module in adapter.modules.items():
        path = config.module_path(layer, name)
        whole = sum(w * part[path] for w, part in zip(WEIGHTS, parts) if path in part)
        torch.testing.assert_close(module.scale * module.b_NR @ module.a_RK, whole, rtol=1e-5, atol=1e-6)
    peft.PeftModel.from_pretrained(load_base(base_dir), tmp_path / "merged")


def test_a_cut_says_what_it_lost_and_a_wide_one_loses_nothing(sources) -> None:
    read = [read_source(path) for path in sources]
    whole, cut = merge(read, WEIGHTS, "svd", rank=7), merge(read, WEIGHTS, "svd", rank=1)
    assert whole.error < 1e-5
    exact = merge(read, WEIGHTS, "linear").factors
    lost = total = 0.0
    for path, factors in cut.factors.items():
        assert factors.rank == 1
        sum_NK = exact[path].b_NR @ exact[path].a_RK
        torch.testing.assert_close(
            whole.factors[path].b_NR @ whole.factors[path].a_RK, sum_NK, rtol=1e-4, atol=1e-5
        )
        lost += float((sum_NK - factors.b_NR @ factors.a_RK).square().sum())
        total += float(sum_NK.square().sum())
    assert cut.error == pytest.approx((lost / total) ** 0.5, rel=1e-3)


def test_ties_of_equal_adapters_at_full_density_is_their_weighted_mean(sources) -> None:
    read = read_source(sources[0])
    made = merge([read, read], [1.0, 3.0], "ties", rank=16, density=1.0)
    for path, delta in deltas(read).items():
        factors = made.factors[path]
        torch.testing.assert_close(factors.b_NR @ factors.a_RK, 2.0 * delta, rtol=1e-4, atol=1e-5)


def test_refusals(config, sources, tmp_path) -> None:
    read = [read_source(path) for path in sources]
    with pytest.raises(InvalidRequest, match="one of linear, svd, ties"):
        merge(read, WEIGHTS, "dare")
    with pytest.raises(InvalidRequest, match="take svd"):
        merge(read, WEIGHTS, "linear", rank=2)
    other = SourceAdapter("x", "", {path: _wider(f) for path, f in read[1].factors.items()})
    with pytest.raises(InvalidRequest, match=r"down_proj is 16 x 24 and 16 x 25.*one base"):
        merge([read[0], other], WEIGHTS, "svd")
    with pytest.raises(NotFound):
        read_source(tmp_path)


def _wider(factors):
    return type(factors)(torch.nn.functional.pad(factors.a_RK, (0, 1)), factors.b_NR)


def test_the_command(config, sources, tmp_path, capsys) -> None:
    out = tmp_path / "merged"
    command = ["adapters", "merge", str(out), f"{sources[0]}=0.7", f"{sources[1]}=-0.4"]
    assert run([*command, "--method", "svd", "--rank", "5"]) == 0
    assert "21 layers of rank 5" in capsys.readouterr().out
    assert read_adapter_info(out, config, None).rank == 5
    assert not list(tmp_path.glob("*.tmp"))
    for wrong, words in (
        (command, "exists already"),
        (["adapters", "merge", str(tmp_path / "b"), str(sources[0])], "two adapters"),
        (["adapters", "merge", str(tmp_path / "b"), f"{sources[0]}=x", str(sources[1])], "weight must be"),
        ([*command[:2], str(tmp_path / "b"), *command[3:], "--method", "mean"], "linear, svd, ties"),
    ):
        assert run(wrong) == 2
        assert words in capsys.readouterr().err
