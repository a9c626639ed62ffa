"""From a directory's safetensors to a `Decoder`: every tensor of the file used once, none missing."""

from __future__ import annotations

import ctypes
import json
import mmap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from coserve.errors import ConfigError
from coserve.kernels.swiglu import Activation
from coserve.layers.attention import Attention
from coserve.layers.embedding import Embedding
from coserve.layers.linear import AdaptedLinear
from coserve.layers.lm_head import LMHead
from coserve.layers.mlp import MLP
from coserve.layers.norm import RMSNorm
from coserve.models.config import ModelConfig
from coserve.models.decoder import Decoder, DecoderLayer
from coserve.models.rope import make_rope_table

Fetch = Callable[[str], torch.Tensor]
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
# Buffers that older checkpoints carry and that are computed here.
COMPUTED = ("rotary_emb.inv_freq", "masked_bias")
FORGET_BYTES = 64 << 20  # of a mapped file that are read before their pages are given back
C_LIBRARY = ctypes.CDLL(None)


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor the model needs, by transformers' names."""
    hidden = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden), NORM: (hidden,)}
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, hidden)
    for layer in range(config.num_layers):
        for name in config.linear_modules:
            path = config.module_path(layer, name)
            shapes[f"{path}.weight"] = config.module_shape(name)
            if _has_bias(config, name):
                shapes[f"{path}.bias"] = config.module_shape(name)[:1]
        prefix = f"model.layers.{layer}"
        for norm in block_norms(config):
            if norm:
                shapes[f"{prefix}.{norm}.weight"] = (hidden,)
        if config.qk_norm:
            whole = config.whole_qk_norm
            shapes[f"{prefix}.self_attn.q_norm.weight"] = (config.q_size if whole else config.head_dim,)
            shapes[f"{prefix}.self_attn.k_norm.weight"] = (config.kv_size if whole else config.head_dim,)
    return shapes


def block_norms(config: ModelConfig) -> tuple[str, str, str, str]:
    """transformers' names of a block's norms before and after attention, before and after the MLP; "" where
    there is none. Without norms after, `post_attention_layernorm` is the one before the MLP."""
    before = "input_layernorm" if config.pre_norms else ""
    if not config.post_norms:
        return before, "", "post_attention_layernorm", ""
    middle = "pre_feedforward_layernorm" if config.pre_norms else ""
    return before, "post_attention_layernorm", middle, "post_feedforward_layernorm"


def load_model(
    path: str | Path, device: torch.device | str, dtype: torch.dtype, max_model_len: int = 0
) -> Decoder:
    """Load a Hugging Face directory (one safetensors file, or shards with an index).

    `max_model_len`, where given, is the context that is served instead of the model's own, longer one.
    Raises ConfigError when the model isn't supported or its tensors are not those of its configuration.
    """
    folder = Path(path)
    config = ModelConfig.from_dir(folder)
    if max_model_len > config.max_position_embeddings:
        raise ConfigError(
            f"--max-model-len {max_model_len} is over the model's context, {config.max_position_embeddings}.",
            param="max_model_len",
        )
    if max_model_len:
        config = replace(config, max_position_embeddings=max_model_len)
    files = _tensor_files(folder)
    shapes = tensor_shapes(config)
    _check_names(set(files), shapes, config)
    checkpoint = _Checkpoint(files, shapes)
    try:
        return build_decoder(config, checkpoint.fetch, device, dtype)
    finally:
        checkpoint.forget()


class _Checkpoint:
    """Tensors of mapped files. What has been read is dropped from the process's memory every so often."""

    def __init__(self, files: dict[str, Path], shapes: dict[str, tuple[int, ...]]) -> None:
        self._files, self._shapes = files, shapes
        self._handles = {file: _open(file) for file in set(files.values())}
        self._fetched: list[torch.Tensor] = []
        self._unforgotten = 0  # bytes

    def fetch(self, name: str) -> torch.Tensor:
        """The tensor as the file has it, for reading alone."""
        tensor, shape = self._handles[self._files[name]].get_tensor(name), self._shapes[name]
        if tuple(tensor.shape) != shape:
            raise ConfigError(
                f"tensor {name} has shape {tuple(tensor.shape)}, config.json asks for {shape}.",
                param="model",
            )
        if not tensor.is_floating_point():
            raise ConfigError(f"tensor {name} is {tensor.dtype}; weights must be floats.", param="model")
        if self._unforgotten > FORGET_BYTES:
            self.forget()
        self._fetched.append(tensor)
        self._unforgotten += tensor.nbytes
        return tensor

    def forget(self) -> None:
        """Give the memory of all pages read so far back; reading one again maps it again."""
        for tensor in self._fetched:
            begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
            length = tensor.data_ptr() + tensor.nbytes - begin
            if length >= mmap.PAGESIZE:
                C_LIBRARY.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), mmap.MADV_DONTNEED)
        self._unforgotten = 0


def random_weights(
    config: ModelConfig, seed: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Decoder:
    """A decoder with normal weights of standard deviation 0.02 and norms near 1, for tests and benches."""
    generator = torch.Generator().manual_seed(seed)
    shapes = tensor_shapes(config)

    def fetch(name: str) -> torch.Tensor:
        values = torch.randn(shapes[name], generator=generator) * 0.02
        if name.endswith("norm.weight"):
            values += 1.0 - config.norm_offset
        return values

    return build_decoder(config, fetch, device, dtype)


def build_decoder(
    config: ModelConfig, fetch: Fetch, device: torch.device | str, dtype: torch.dtype
) -> Decoder:
    """Assemble a decoder from tensors by name; `fetch` is asked once for each of `tensor_shapes`. What it
    gives, floats of any dtype on the CPU, is copied."""
    rope = make_rope_table(config, device)
    local_rope = make_rope_table(config, device, local=True) if config.local_rope_theta else rope

    def own(name: str) -> torch.Tensor:
        return fetch(name).to(device=device, dtype=dtype, copy=True)

    def head_of(name: str) -> LMHead:
        return LMHead(fetch(name), None, dtype, device)

    def linear(layer: int, *names: str) -> AdaptedLinear:
        paths = [config.module_path(layer, name) for name in names]
        weights = [fetch(f"{path}.weight") for path in paths]
        biases = [
            own(f"{path}.bias") if _has_bias(config, name) else None
            for path, name in zip(paths, names, strict=True)
        ]
        modules = [config.linear_modules.index(name) for name in names]
        return AdaptedLinear(modules, weights, biases, dtype, device)

    def norm(name: str) -> RMSNorm:
        weight_H = own(f"{name}.weight")
        if config.wide_norms:
            weight_H = weight_H.float() + config.norm_offset
        return RMSNorm(weight_H, config.rms_norm_eps)

    def block(layer: int) -> DecoderLayer:
        prefix = f"model.layers.{layer}"
        heads = f"{prefix}.self_attn"
        attention = Attention(
            config,
            linear(layer, *(("qkv_proj",) if config.fused else ("q_proj", "k_proj", "v_proj"))),
            linear(layer, "o_proj"),
            local_rope if config.slides(layer) else rope,
            norm(f"{heads}.q_norm") if config.qk_norm else None,
            norm(f"{heads}.k_norm") if config.qk_norm else None,
            config.window(layer),
        )
        act: Activation = "silu" if config.hidden_act == "silu" else "gelu_tanh"
        gate_up = linear(layer, *(("gate_up_proj",) if config.fused else ("gate_proj", "up_proj")))
        mlp = MLP(gate_up, linear(layer, "down_proj"), act)
        names = block_norms(config)
        before, after, middle, last = (norm(f"{prefix}.{name}") if name else None for name in names)
        return DecoderLayer(before, attention, middle, mlp, after, last)

    scale = config.hidden_size**0.5 if config.scaled_embeddings else 1.0
    tied = head_of(EMBEDDING) if config.tie_word_embeddings else None
    embedding = Embedding(own(EMBEDDING) if tied is None else tied, scale)
    layers = [block(layer) for layer in range(config.num_layers)]
    head = head_of(HEAD) if tied is None else tied
    return Decoder(config, embedding, layers, norm(NORM.removesuffix(".weight")), head)


def _has_bias(config: ModelConfig, name: str) -> bool:
    if name == "o_proj":
        return config.o_bias
    return config.attention_bias if name in ("q_proj", "k_proj", "v_proj") else config.mlp_bias


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> file, from the index where there is one, else from the files' own headers."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = {str(name): folder / Path(str(file)).name for name, file in weight_map.items()}
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ConfigError(
                f"{index.name} is not a safetensors index: {error!r}.", param="model"
            ) from error
        for file in sorted(set(files.values())):
            if not file.is_file():
                raise ConfigError(f"{index.name} names {file.name}, which is missing.", param="model")
        return files
    single = folder / "model.safetensors"
    found = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    return {name: file for file in found for name in _open(file).keys()}  # noqa: SIM118


def _open(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{file.name} can't be read as safetensors: {error}", param="model") from error


def _check_names(names: set[str], shapes: dict[str, tuple[int, ...]], config: ModelConfig) -> None:
    missing = sorted(set(shapes) - names)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ConfigError(f"the checkpoint lacks the tensor {missing[0]}{more}.", param="model")
    extra = names - set(shapes) - ({HEAD} if config.tie_word_embeddings else set())
    unknown = sorted(name for name in extra if not name.endswith(COMPUTED))
    if unknown:
        raise ConfigError(
            f"the checkpoint has a tensor that {config.family} doesn't: {unknown[0]} "
            f"({len(unknown)} in all); is config.json the right one?",
            param="model",
        )
