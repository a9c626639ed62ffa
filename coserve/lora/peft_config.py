"""adapter_config.json in PEFT's words: what we can serve of it, which modules it names, and with what scale.

Scale of a module: alpha / r, or alpha / sqrt(r) with rsLoRA (Kalajdzievski 2023); `rank_pattern` and
`alpha_pattern` override r and alpha for the module paths they match.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import regex

from coserve.errors import InvalidRequest
from coserve.models.config import HEAD_MODULE

_PATIENCE = 0.02  # seconds for one path; an ordinary expression takes microseconds

# Settings that ask for something else than plain LoRA on linear layers, with the reason of the refusal.
_REFUSED = {
    "use_dora": "DoRA is not supported",
    "lora_bias": "biases on lora_B are not supported",
    "modules_to_save": "full copies of modules (modules_to_save) are not supported",
    "trainable_token_indices": "embedding rows (trainable_token_indices) are not supported",
    "target_parameters": "adapters on raw parameters (target_parameters) are not supported",
    "layer_replication": "layer_replication is not supported",
    "fan_in_fan_out": "fan_in_fan_out is for Conv1D layers, which this model has none of",
    "alora_invocation_tokens": "activated LoRA (alora_invocation_tokens) is not supported",
    "use_qalora": "QA-LoRA is not supported",
    "use_bdlora": "BD-LoRA is not supported",
    "arrow_config": "Arrow routing is not supported",
    "kasa_config": "KaSA is not supported",
    "monteclora_config": "MonteCLoRA is not supported",
    "velora_config": "VeLoRA is not supported",
}
# Known settings that say nothing about the forward pass of a finished adapter.
_WITHOUT_EFFECT = frozenset(
    (
        *("task_type", "base_model_name_or_path", "revision", "peft_version", "auto_mapping"),
        *("inference_mode", "lora_dropout", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
        *("megatron_config", "megatron_core", "ensure_weight_tying", "qalora_group_size", "runtime_config"),
    )
)
_READ = frozenset(
    (
        *("peft_type", "r", "lora_alpha", "bias", "target_modules", "exclude_modules", "rank_pattern"),
        *("alpha_pattern", "use_rslora", "layers_to_transform", "layers_pattern", "init_lora_weights"),
    )
)
_REWRITES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_NOT_LINEAR = {
    "embed_tokens": "embedding adapters are not supported",
}


@dataclass(frozen=True)
class PeftConfig:
    """The settings that decide what a LoRA adapter computes."""

    r: int
    alpha: float
    target_modules: tuple[str, ...] | str
    exclude_modules: tuple[str, ...] | str
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    use_rslora: bool
    layers_to_transform: tuple[int, ...] | None

    @classmethod
    def parse(cls, value: Any) -> PeftConfig:
        """From adapter_config.json's object. Raises InvalidRequest (without `param`) with the reason."""
        if not isinstance(value, dict):
            _refuse("adapter_config.json is not a JSON object")
        if value.get("peft_type") != "LORA":
            _refuse(f"peft_type {value.get('peft_type')!r} is not supported; only LORA is")
        for name, reason in _REFUSED.items():
            if value.get(name):
                _refuse(reason)
        for name in sorted(value.keys() - _READ - _REFUSED.keys() - _WITHOUT_EFFECT):
            if value[name]:
                _refuse(f"adapter_config.json has a setting {name!r} that is not known here")
        if value.get("bias", "none") != "none":
            _refuse(f"bias {value['bias']!r} is not supported; only 'none' is")
        init = value.get("init_lora_weights", True)
        if isinstance(init, str) and init.startswith(_REWRITES_BASE):
            _refuse(
                f"init_lora_weights {init!r} changes the base weights; export the adapter as a difference to "
                "the original base (path_initial_model_for_weight_conversion)"
            )
        layers = value.get("layers_to_transform")
        if value.get("layers_pattern") not in (None, "", [], "layers", ["layers"]):
            _refuse("layers_pattern is not supported; the blocks of these models are called 'layers'")
        return cls(
            r=_rank("r", value.get("r")),
            alpha=_alpha("lora_alpha", value.get("lora_alpha")),
            target_modules=_targets("target_modules", value.get("target_modules")),
            exclude_modules=_targets("exclude_modules", value.get("exclude_modules") or []),
            rank_pattern={k: _rank("rank_pattern", v) for k, v in _pattern("rank_pattern", value).items()},
            alpha_pattern={
                k: _alpha("alpha_pattern", v) for k, v in _pattern("alpha_pattern", value).items()
            },
            use_rslora=bool(value.get("use_rslora", False)),
            layers_to_transform=_layers(layers),
        )

    def targets(self, path: str, layer: int) -> bool:
        """Whether the linear layer at `path` ("model.layers.0.self_attn.q_proj") is adapted."""
        if self.exclude_modules and _matches(self.exclude_modules, path):
            return False
        if not _matches(self.target_modules, path):
            return False
        # As in PEFT, layers_to_transform narrows names only, neither patterns nor whole paths.
        narrowed = not isinstance(self.target_modules, str) and path not in self.target_modules
        return not narrowed or self.layers_to_transform is None or layer in self.layers_to_transform

    def rank(self, path: str) -> int:
        return self.rank_pattern.get(_pattern_key(self.rank_pattern, path), self.r)

    def scale(self, path: str) -> float:
        """What B's product is multiplied by."""
        alpha = self.alpha_pattern.get(_pattern_key(self.alpha_pattern, path), self.alpha)
        rank = self.rank(path)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def check_names(self, paths: Mapping[str, int], adapted: Mapping[str, int]) -> None:
        """Refuse target names and pattern keys that match nothing. `paths` are the model's linear layers with
        their layer numbers, `adapted` those of them that the adapter has tensors for."""
        if not isinstance(self.target_modules, str):
            for name in self.target_modules:
                if not any(_matches((name,), path) for path in paths):
                    leaf = name.rsplit(".", 1)[-1]
                    _refuse(_NOT_LINEAR.get(leaf, f"unknown target module {name!r}: this model has none"))
        for setting, pattern in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            for key in pattern:
                if not any(_pattern_key((key,), path) for path in adapted):
                    _refuse(f"{setting} key {key!r} matches none of the adapted modules")

    def check_exclusions(self, paths: Iterable[str]) -> None:
        """Refuse excluded names that match none of the model's linear layers."""
        excluded = self.exclude_modules
        for name in (excluded,) if isinstance(excluded, str) else excluded:
            pattern = name if isinstance(excluded, str) else (name,)
            if not any(_matches(pattern, path) for path in paths):
                _refuse(f"exclude_modules has {name!r}, which matches no linear layer of this model")


def _matches(targets: tuple[str, ...] | str, path: str) -> bool:
    if targets == "all-linear":
        return path != HEAD_MODULE
    if isinstance(targets, str):
        return _fits(targets, path, "target_modules")
    return any(path == name or path.endswith("." + name) for name in targets)


def _pattern_key(keys: Iterable[str], path: str) -> str:
    """The first key that matches the end of `path`, as PEFT looks them up; "" when none does."""
    return next((key for key in keys if _fits(rf"(.*\.)?({key})", path, "pattern key", key)), "")


def _fits(pattern: str, path: str, what: str, shown: str = "") -> bool:
    """Whether the whole path matches. Who uploads an adapter chooses the pattern: Python's own `re` could
    look for a match for ever, with every other thread standing still."""
    given = shown or pattern
    try:
        return regex.fullmatch(pattern, path, timeout=_PATIENCE) is not None
    except regex.error as error:
        _refuse(f"{what} {given[:200]!r} is not a valid regular expression ({error})")
    except TimeoutError:
        _refuse(f"{what} {given[:200]!r} takes too long to match; write a simpler expression")


def _targets(name: str, value: Any) -> tuple[str, ...] | str:
    if isinstance(value, str) and value:
        return value
    names = isinstance(value, list) and all(isinstance(item, str) for item in value)
    if names and (value or name != "target_modules"):
        return tuple(sorted(value))
    _refuse(f"{name} must name modules, as a list of names or one regular expression")


def _pattern(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    value = config.get(name) or {}
    if not isinstance(value, dict):
        _refuse(f"{name} must be an object of module name -> value")
    return value


def _rank(name: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        _refuse(f"{name} must be a positive integer, not {value!r}")
    return value


def _alpha(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        _refuse(f"{name} must be a number, not {value!r}")
    return float(value)


def _layers(value: Any) -> tuple[int, ...] | None:
    if value is None or value == []:
        return None
    layers = [value] if type(value) is int else value
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        _refuse("layers_to_transform must be a layer number or a list of them")
    return tuple(sorted(layers))


def _refuse(reason: str) -> NoReturn:
    raise InvalidRequest(reason)
