"""Several adapters of one base made into one: their weighted sum, whole or cut to a rank, or TIES.

An adapter adds D = s B A to a layer's weight, with s its scale, A [r, in] and B [out, r]. Of adapters i with
weights w_i:

    linear   sum w_i D_i, exactly: the factors side by side, so the ranks add up (PEFT calls it "cat")
    svd      the best approximation of that sum of the rank wanted (Eckart-Young)
    ties     TIES-Merging (Yadav et al. 2023, arXiv 2306.01708): each D_i keeps its `density` of entries of
             greatest magnitude, each entry's sign is elected by their sum, and those that agree with it are
             averaged, weighted; then cut to the rank as svd

Works on the files alone: no base model is needed. What comes out has scale 1 (alpha = rank) everywhere.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from coserve.errors import InvalidRequest, NotFound
from coserve.lora.peft_config import PeftConfig
from coserve.lora.peft_files import (
    BASE_HEAD_KEY,
    CONFIG_FILE,
    TENSOR_FILE,
    make_config,
    path_of_key,
    tensor_key,
    write_adapter,
)

METHODS = ("linear", "svd", "ties")


@dataclass(frozen=True)
class Factors:
    """What an adapter adds to one layer: the product of `b_NR` and `a_RK`, fp32, its scale within."""

    a_RK: torch.Tensor
    b_NR: torch.Tensor

    @property
    def rank(self) -> int:
        return self.a_RK.shape[0]


@dataclass(frozen=True)
class SourceAdapter:
    """An adapter to be merged: its factors by the layer's path ("model.layers.0.self_attn.q_proj")."""

    name: str
    base_model_name: str
    factors: dict[str, Factors]


@dataclass(frozen=True)
class Merged:
    """The result. `error` is what cutting to the rank has lost of the sum, in Frobenius norm over all layers,
    as a share of the sum's."""

    factors: dict[str, Factors]
    error: float

    @property
    def rank(self) -> int:
        """The largest of its layers'."""
        return max(factors.rank for factors in self.factors.values())


def read_source(directory: str | Path) -> SourceAdapter:
    """A PEFT directory. Raises NotFound, or InvalidRequest saying what isn't plain LoRA about it."""
    folder = Path(directory)
    if not (folder / CONFIG_FILE).is_file() or not (folder / TENSOR_FILE).is_file():
        raise NotFound(f"{folder}: there is no {CONFIG_FILE} with {TENSOR_FILE} here.")
    try:
        raw = json.loads((folder / CONFIG_FILE).read_bytes())
        config = PeftConfig.parse(raw)
        tensors = load_file(folder / TENSOR_FILE)
    except InvalidRequest as error:
        raise InvalidRequest(f"{folder}: {error.message}") from None
    except (OSError, ValueError, RuntimeError) as error:
        raise InvalidRequest(f"{folder}: can't be read ({error}).") from None
    factors = {}
    for path in sorted({path_of_key(key) for key in tensors if key != BASE_HEAD_KEY}):
        a, b = tensors.get(tensor_key(path, "A")), tensors.get(tensor_key(path, "B"))
        if a is None or b is None:
            raise InvalidRequest(f"{folder}: {path or 'a tensor'} has no lora_A with a lora_B.")
        rank = config.rank(path)
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank:
            raise InvalidRequest(
                f"{folder}: the tensors of {path} don't have the rank {rank} of its settings."
            )
        if not (bool(a.isfinite().all()) and bool(b.isfinite().all())):
            raise InvalidRequest(f"{folder}: {path} holds values that are not finite.")
        factors[path] = Factors(a.float(), b.float() * config.scale(path))
    if not factors:
        raise InvalidRequest(f"{folder}: there is no LoRA tensor in it.")
    return SourceAdapter(str(folder), raw.get("base_model_name_or_path") or "", factors)


def merge(
    sources: Sequence[SourceAdapter],
    weights: Sequence[float],
    method: str,
    *,
    rank: int = 0,
    density: float = 0.5,
) -> Merged:
    """One adapter of several. `rank` 0 is the largest of theirs (linear: has none to be cut to); `density` is
    of ties. Raises InvalidRequest where the adapters aren't of one base model's shapes."""
    if method not in METHODS:
        raise InvalidRequest(f"method must be one of {', '.join(METHODS)}, not {method}.", param="method")
    if method == "linear" and rank:
        raise InvalidRequest("linear adds the ranks up; take svd for a rank of your own.", param="rank")
    wanted = rank or max(factors.rank for source in sources for factors in source.factors.values())
    made: dict[str, Factors] = {}
    lost = whole = 0.0
    for path in sorted({path for source in sources for path in source.factors}):
        parts = _parts(sources, weights, path)
        if method == "linear":
            made[path] = _side_by_side(parts)
            continue
        u_NR, s_R, v_RK = _sum_svd(parts) if method == "svd" else _ties_svd(parts, density)
        root = s_R[:wanted].sqrt()
        made[path] = Factors(root[:, None] * v_RK[:wanted], u_NR[:, :wanted] * root)
        lost += float(s_R[wanted:].square().sum())
        whole += float(s_R.square().sum())
    return Merged(made, (lost / whole) ** 0.5 if whole else 0.0)


def write_merged(directory: Path, merged: Merged, base_model_name: str) -> None:
    """A PEFT directory, made under a temporary name and renamed when it is whole. FileExistsError when it is
    there already."""
    if directory.exists():
        raise FileExistsError(directory)
    ranks = {path: factors.rank for path, factors in merged.factors.items()}
    usual = max(set(ranks.values()), key=list(ranks.values()).count)
    others = {path: rank for path, rank in ranks.items() if rank != usual}
    config = make_config(
        r=usual,
        lora_alpha=usual,
        target_modules=list(ranks),
        base_model_name=base_model_name,
        rank_pattern=others,
        alpha_pattern=others,
    )
    tensors = {}
    for path, factors in merged.factors.items():
        tensors[tensor_key(path, "A")] = factors.a_RK
        tensors[tensor_key(path, "B")] = factors.b_NR
    made = directory.with_name(directory.name + ".tmp")
    shutil.rmtree(made, ignore_errors=True)
    write_adapter(made, tensors, config)
    os.rename(made, directory)


def _parts(
    sources: Sequence[SourceAdapter], weights: Sequence[float], path: str
) -> list[tuple[float, Factors]]:
    found = [
        (weight, source.factors[path]) for source, weight in zip(sources, weights) if path in source.factors
    ]
    shapes = {(factors.b_NR.shape[0], factors.a_RK.shape[1]) for _, factors in found}
    if len(shapes) > 1:
        sizes = " and ".join(
            f"{out_features} x {in_features}" for out_features, in_features in sorted(shapes)
        )
        raise InvalidRequest(f"{path} is {sizes}: these adapters are not of one base model.")
    return found


def _side_by_side(parts: Sequence[tuple[float, Factors]]) -> Factors:
    a_RK = torch.cat([factors.a_RK for _, factors in parts])
    return Factors(a_RK, torch.cat([weight * factors.b_NR for weight, factors in parts], dim=1))


def _sum_svd(parts: Sequence[tuple[float, Factors]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(U, S, V^T) of the weighted sum, by way of its factors: no matrix of the layer's size is made."""
    together = _side_by_side(parts)
    left_NR, left_RR = torch.linalg.qr(together.b_NR.double())
    right_KR, right_RR = torch.linalg.qr(together.a_RK.double().T)
    u_RR, s_R, v_RR = torch.linalg.svd(left_RR @ right_RR.T, full_matrices=False)
    return (left_NR @ u_RR).float(), s_R.float(), (v_RR @ right_KR.T).float()


def _ties_svd(
    parts: Sequence[tuple[float, Factors]], density: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(U, S, V^T) of what TIES makes of the layer's additions."""
    kept = torch.stack([_trimmed(factors.b_NR @ factors.a_RK, density) for _, factors in parts])
    agrees = (kept.sign() == kept.sum(0).sign()) & (kept != 0)
    weights = torch.tensor([weight for weight, _ in parts])[:, None, None]
    merged_NK = (weights * kept * agrees).sum(0) / agrees.sum(0).clamp(min=1)
    return torch.linalg.svd(merged_NK, full_matrices=False)


def _trimmed(delta_NK: torch.Tensor, density: float) -> torch.Tensor:
    """The `density` of entries of greatest magnitude; the others are 0."""
    count = max(1, int(density * delta_NK.numel()))
    places = delta_NK.abs().flatten().topk(count).indices
    trimmed = torch.zeros(delta_NK.numel())
    trimmed[places] = delta_NK.flatten()[places]
    return trimmed.reshape(delta_NK.shape)


def same_base(sources: Sequence[SourceAdapter]) -> str:
    """The base model that all of them name; "" where they name none or several."""
    names = {source.base_model_name for source in sources}
    return names.pop() if len(names) == 1 else ""
