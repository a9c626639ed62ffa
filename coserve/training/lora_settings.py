"""What a job's LoRA settings mean for a model: which linears, which ranks and scales. Free of torch."""

from __future__ import annotations

from typing import Any

from coserve.errors import InvalidRequest
from coserve.lora.peft_config import PeftConfig
from coserve.lora.peft_files import make_config
from coserve.models.config import ModelConfig
from coserve.training.job import LoraSpec

INITS = ("default", "gaussian")
MAX_RANK = 256


def peft_config(spec: LoraSpec, config: ModelConfig, base_model_name: str = "") -> dict[str, Any]:
    """adapter_config.json of an adapter with these settings, their defaults filled in."""
    return make_config(
        r=spec.r,
        lora_alpha=spec.lora_alpha or 2 * spec.r,
        target_modules=spec.target_modules or config.linear_modules,
        exclude_modules=spec.exclude_modules,
        base_model_name=base_model_name,
        rank_pattern=spec.rank_pattern,
        alpha_pattern=spec.alpha_pattern,
        use_rslora=spec.use_rslora,
        layers_to_transform=spec.layers_to_transform,
        lora_dropout=spec.lora_dropout,
        init_lora_weights=spec.init_lora_weights,
    )


def resolve_lora(spec: LoraSpec, config: ModelConfig) -> PeftConfig:
    """The settings checked against the model.

    Raises InvalidRequest for target modules that are unknown or not supported (embeddings), for
    layers, exclusions and pattern keys that match nothing, a rank outside 1 to 256, a dropout outside [0, 1)
    and an unknown start.
    """
    for path, rank in {"r": spec.r, **{f"rank_pattern.{k}": v for k, v in spec.rank_pattern.items()}}.items():
        if not 1 <= rank <= MAX_RANK:
            raise InvalidRequest(f"{path} is {rank}; it must be 1 to {MAX_RANK}", param=f"lora.{path}")
    if spec.init_lora_weights not in INITS:
        raise InvalidRequest(
            f"init_lora_weights {spec.init_lora_weights!r} is unknown; it is {' or '.join(INITS)}",
            param="lora.init_lora_weights",
        )
    if not 0.0 <= spec.lora_dropout < 1.0:
        raise InvalidRequest(
            f"lora_dropout is {spec.lora_dropout}; it must be at least 0 and less than 1",
            param="lora.lora_dropout",
        )
    beyond = [layer for layer in spec.layers_to_transform if not 0 <= layer < config.num_layers]
    if beyond:
        raise InvalidRequest(
            f"layers_to_transform has {beyond[0]}; the model's layers are 0 to {config.num_layers - 1}",
            param="lora.layers_to_transform",
        )
    paths = {path: layer for path, (layer, _) in config.adapter_places.items()}
    try:
        resolved = PeftConfig.parse(peft_config(spec, config))
        wanted = {path: layer for path, layer in paths.items() if resolved.targets(path, layer)}
        resolved.check_names(paths, wanted)
        resolved.check_exclusions(paths)
        if not wanted:
            raise InvalidRequest("exclude_modules and layers_to_transform leave no module to adapt")
    except InvalidRequest as error:
        raise InvalidRequest(error.message, param="lora") from error
    return resolved
