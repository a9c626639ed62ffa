"""A PEFT directory: checked before it is loaded, and written as PEFT itself writes it. Free of torch.

    adapter_config.json         the settings (peft_config.py)
    adapter_model.safetensors   base_model.model.<module path>.lora_{A,B}.weight, A [r, in], B [out, r]

Every key must belong to a module that the settings name, and every such module must have both tensors in
the right shapes: PEFT would only warn and serve the base model.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np

from coserve.errors import InvalidRequest, NotFound
from coserve.lora.peft_config import PeftConfig
from coserve.lora.safetensors_file import write_tensors
from coserve.lora.safetensors_header import BadSafetensors, TensorEntry, read_header
from coserve.models.config import HEAD_MODULE

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 1 << 20
_FLOATS = ("F32", "F16", "BF16")
_PREFIX = "base_model.model."
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # torch.compile's, FSDP's
BASE_HEAD_KEY = f"{_PREFIX}lm_head.base_layer.weight"  # PEFT saves the base's head beside its adapter


class LinearShapes(Protocol):
    """What is needed of a model's configuration (models/config.py has it)."""

    @property
    def num_layers(self) -> int: ...
    @property
    def linear_modules(self) -> tuple[str, ...]: ...
    @property
    def adapter_places(self) -> dict[str, tuple[int, str]]: ...
    def module_shape(self, name: str) -> tuple[int, int]: ...
    def module_path(self, layer: int, name: str) -> str: ...


@dataclass(frozen=True)
class ModuleInfo:
    """The adapter of one linear layer: rank and what B's product is multiplied by."""

    rank: int
    scale: float


@dataclass(frozen=True)
class AdapterInfo:
    """A checked adapter directory.

    `rank` is the largest of its modules', `modules` maps (layer, module name) to each one's, `digest` is the
    sha256 (hex) over what it computes: the modules' ranks and scales, and the bytes of the tensor file.
    """

    path: str
    rank: int
    modules: dict[tuple[int, str], ModuleInfo]
    digest: str
    config: dict[str, Any]


def tensor_key(path: str, side: str) -> str:
    """PEFT's name for a module's tensor; `side` is "A" or "B"."""
    return f"{_PREFIX}{path}.lora_{side}.weight"


def path_of_key(key: str) -> str:
    """The module path of one of PEFT's LoRA tensor names, of either side; "" for any other name."""
    path = key.removeprefix(_PREFIX).removesuffix(".weight")
    for side in "AB":
        if key == tensor_key(path.removesuffix(f".lora_{side}"), side):
            return path.removesuffix(f".lora_{side}")
    return ""


def read_adapter_info(
    path: str | Path, model: LinearShapes, max_rank: int | None, *, param: str = "lora_path"
) -> AdapterInfo:
    """Check a PEFT directory against a model without loading its tensors.

    Raises NotFound when there is no such directory and InvalidRequest, naming the reason, for everything that
    would not give exactly this adapter's output. `param` is the field the caller got the path from.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise NotFound("no such adapter directory", param=param)
    try:
        return _checked(directory, model, max_rank)
    except InvalidRequest as error:
        raise InvalidRequest(f"cannot load the adapter: {error.message}", param=param) from error
    except OSError as error:
        raise InvalidRequest(
            f"cannot load the adapter: {Path(error.filename or '').name} cannot be read ({error.strerror})",
            param=param,
        ) from error


def _checked(directory: Path, model: LinearShapes, max_rank: int | None) -> AdapterInfo:
    raw = _read_config(directory)
    config = PeftConfig.parse(raw)
    entries = _read_tensors_header(directory)
    paths = model.adapter_places
    layers = {path: layer for path, (layer, _) in paths.items()}
    wanted = [path for path, layer in layers.items() if config.targets(path, layer)]
    config.check_names(layers, {path: layers[path] for path in wanted})
    if not wanted:
        _refuse("its settings match no linear layer of this model")
    expected = {tensor_key(path, side) for path in wanted for side in "AB"}
    if HEAD_MODULE in wanted and BASE_HEAD_KEY in entries:
        expected.add(BASE_HEAD_KEY)
        _check_tensor(entries, BASE_HEAD_KEY, model.module_shape(HEAD_MODULE))
    _check_keys(entries, expected)
    modules = {}
    for path in wanted:
        rank = config.rank(path)
        if max_rank is not None and rank > max_rank:
            _refuse(f"rank {rank} of {path} is over the maximum of {max_rank} (--max-lora-rank)")
        out_features, in_features = model.module_shape(paths[path][1])
        _check_tensor(entries, tensor_key(path, "A"), (rank, in_features))
        _check_tensor(entries, tensor_key(path, "B"), (out_features, rank))
        modules[paths[path]] = ModuleInfo(rank, config.scale(path))
    return AdapterInfo(
        path=str(directory),
        rank=max(module.rank for module in modules.values()),
        modules=modules,
        digest=_digest(modules, directory / TENSOR_FILE),
        config=raw,
    )


def _read_config(directory: Path) -> Any:
    file = directory / CONFIG_FILE
    if not file.is_file():
        _refuse(f"there is no {CONFIG_FILE}")
    if file.stat().st_size > MAX_CONFIG_BYTES:
        _refuse(f"{CONFIG_FILE} is over {MAX_CONFIG_BYTES >> 20} MiB")
    try:
        return json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        _refuse(f"{CONFIG_FILE} is not valid JSON")


def _read_tensors_header(directory: Path) -> dict[str, TensorEntry]:
    file = directory / TENSOR_FILE
    if not file.is_file():
        _refuse(no_tensors(directory))
    try:
        return read_header(file)
    except BadSafetensors as error:
        _refuse(f"{TENSOR_FILE} cannot be read: {error}")


def no_tensors(directory: Path) -> str:
    """What is wrong with a directory that has no tensor file."""
    if any(directory.glob("*.bin")) or any(directory.glob("*.pt")):
        return f"there is no {TENSOR_FILE}; pickle files (.bin, .pt) are never loaded, convert them"
    return f"there is no {TENSOR_FILE}"


def _check_keys(entries: Mapping[str, TensorEntry], expected: set[str]) -> None:
    for key in entries:
        if key in expected:
            continue
        if "lora_magnitude_vector" in key:
            _refuse("DoRA is not supported")
        if "lora_embedding" in key or "embed_tokens" in key:
            _refuse("embedding adapters are not supported")
        if "lm_head" in key and "lora_" not in key:
            _refuse(f"{key!r} is a full copy of the head; only LoRA on lm_head is supported")
        wrapper = next((name for name in _WRAPPERS if f"{name}." in key), None)
        if wrapper is not None:
            _refuse(f"unexpected key {key!r}: {wrapper!r} is a wrapper's; save the model that it wraps")
        if not key.startswith(_PREFIX):
            _refuse(f"unexpected key {key!r}: keys must begin with {_PREFIX!r}, as PEFT saves them")
    unexpected = sorted(entries.keys() - expected)
    missing = sorted(expected - entries.keys())
    if unexpected:
        _refuse(f"unexpected key {unexpected[0]!r}{_and_more(unexpected)}: no adapted module of this model")
    if missing:
        _refuse(f"missing key {missing[0]!r}{_and_more(missing)}")


def _check_tensor(entries: Mapping[str, TensorEntry], key: str, shape: tuple[int, int]) -> None:
    entry = entries[key]
    if entry.dtype not in _FLOATS:
        _refuse(f"{key} has dtype {entry.dtype}; only F32, F16 and BF16 are supported")
    if entry.shape != shape:
        _refuse(
            f"{key} has shape {list(entry.shape)} where this model and this rank need {list(shape)}; it "
            "was made for another base model or its settings are wrong"
        )


def _and_more(keys: list[str]) -> str:
    return f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""


def _digest(modules: Mapping[tuple[int, str], ModuleInfo], tensor_file: Path) -> str:
    # The settings count by their effect: PEFT writes sets in no stable order, and names that change nothing.
    effect = [[layer, name, info.rank, info.scale] for (layer, name), info in sorted(modules.items())]
    digest = hashlib.sha256(json.dumps(effect).encode())
    with open(tensor_file, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _refuse(reason: str) -> NoReturn:
    raise InvalidRequest(reason)


# ---------------------------------------------------------------- writing


def make_config(
    *,
    r: int,
    lora_alpha: float,
    target_modules: tuple[str, ...] | list[str],
    exclude_modules: tuple[str, ...] = (),
    base_model_name: str = "",
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    use_rslora: bool = False,
    layers_to_transform: tuple[int, ...] = (),
    lora_dropout: float = 0.0,
    init_lora_weights: str = "default",
) -> dict[str, Any]:
    """An adapter_config.json as PEFT writes it for a causal language model."""
    return {
        "alpha_pattern": dict(alpha_pattern or {}),
        "auto_mapping": None,
        "base_model_name_or_path": base_model_name or None,
        "bias": "none",
        "exclude_modules": sorted(exclude_modules) or None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True if init_lora_weights == "default" else init_lora_weights,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": list(layers_to_transform) or None,
        "loftq_config": {},
        "lora_alpha": int(lora_alpha) if float(lora_alpha).is_integer() else lora_alpha,
        "lora_bias": False,
        "lora_dropout": lora_dropout,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": r,
        "rank_pattern": dict(rank_pattern or {}),
        "revision": None,
        "target_modules": sorted(target_modules),
        "task_type": "CAUSAL_LM",
        "trainable_token_indices": None,
        "use_dora": False,
        "use_rslora": use_rslora,
    }


def write_adapter(directory: Path, tensors: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, str]:
    """Both files, synced to disk, into `directory`, which whoever puts it together renames when it is whole.
    Returns the sha256 (hex) of each.

    `tensors` maps PEFT's keys (`tensor_key`) to numpy arrays or torch tensors; they are written in fp32.
    """
    directory.mkdir(parents=True, exist_ok=True)
    arrays = {key: _as_numpy(tensor) for key, tensor in tensors.items()}
    sums = {TENSOR_FILE: write_tensors(directory / TENSOR_FILE, arrays, {"format": "pt"})}
    text = json.dumps(config, indent=2, sort_keys=True).encode()
    sums[CONFIG_FILE] = hashlib.sha256(text).hexdigest()
    (directory / CONFIG_FILE).write_bytes(text)
    for path in (directory / CONFIG_FILE, directory):
        _sync(path)
    return sums


def _as_numpy(tensor: Any) -> np.ndarray:
    array = tensor.detach().cpu().numpy() if hasattr(tensor, "detach") else tensor
    return np.asarray(array, dtype=np.float32)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
