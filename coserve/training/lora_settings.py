"""What a job's LoRA settings mean for a model: which linears, which ranks and scales. Free of torch."""

from __future__ import annotations

from typing import Any

from coserve.errors import InvalidRequest
from coserve.lora.peft_config import PeftConfig
from coserve.lora.peft_files import make_config
from coserve.models.config import ModelConfig
from coserve.training.job import LoraSpec


def peft_config(spec: LoraSpec, config: ModelConfig, base_model_name: str = "") -> dict[str, Any]:
    """adapter_config.json of an adapter with these settings, their defaults filled in."""
    return make_config(
        r=spec.r,
        lora_alpha=spec.lora_alpha or 2 * spec.r,
        target_modules=spec.target_modules or config.linear_modules,
        base_model_name=base_model_name,
        rank_pattern=spec.rank_pattern,
        alpha_pattern=spec.alpha_pattern,
        use_rslora=spec.use_rslora,
        layers_to_transform=spec.layers_to_transform,
        lora_dropout=spec.lora_dropout,
    )


def resolve_lora(spec: LoraSpec, config: ModelConfig) -> PeftConfig:
    """The settings checked against the model.

    Raises InvalidRequest for target modules that are unknown or not supported (lm_head, embeddings), and for
    layers and pattern keys that match nothing, and a dropout outside [0, 1).
    """
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
    paths = {
        config.module_path(layer, name): layer
        for layer in range(config.num_layers)
        for name in config.linear_modules
    }
    try:
        resolved = PeftConfig.parse(peft_config(spec, config))
        wanted = {path: layer for path, layer in paths.items() if resolved.targets(path, layer)}
        resolved.check_names(paths, wanted)
    except InvalidRequest as error:
        raise InvalidRequest(error.message, param="lora") from error
    return resolved
