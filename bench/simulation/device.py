"""Devices made of arithmetic, the shapes of published models, and what their tokens cost: a roofline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from coserve.core.slo import CALLS_BESIDE
from coserve.core.span import InferenceSpan, TrainingSpan
from coserve.models.config import ModelConfig

BYTES = 2  # of a weight and of a cached element: bf16


@dataclass(frozen=True)
class Device:
    """`flops` and `bandwidth` are what products and weight streams reach, not data sheets; `memory` is bytes,
    `overhead` the seconds of a step outside of them. `calls_beside` backward calls of a step at most run on a
    stream of their own beside the forward, in the arithmetic that it leaves idle; it ends no sooner than
    their launches, of `launch` seconds each. A step's time varies by a lognormal factor of deviation `noise`.
    `link` and `disk` are the bytes a second from host memory to the device and from files to host memory."""

    name: str
    flops: float
    bandwidth: float
    memory: float
    overhead: float
    calls_beside: int = 0
    launch: float = 0.0
    noise: float = 0.03
    link: float = 10e9
    disk: float = 1e9

    def seconds(self, flops: float, moved: float) -> float:
        """The roofline: of `flops` operations over `moved` bytes."""
        return max(flops / self.flops, moved / self.bandwidth)


# Two cores of an AMD EPYC with AVX-512 BF16 (docs/kernels.md), and an H200 (NVIDIA's data sheet: 989 TFLOP/s,
# 4.8 TB/s) at four fifths of its bandwidth and at 0.7 of its arithmetic. Four of them as one, a fifth of all
# spent between them: the engine has no tensor parallelism, this is for planning alone.
_GPU = {"calls_beside": CALLS_BESIDE, "launch": 1.5e-4, "disk": 3e9}
DEVICES = {
    "cpu": Device("cpu", 0.42e12, 28e9, 20e9, 2e-3),
    "h200": Device("h200", 690e12, 3.9e12, 141e9, 6e-4, link=40e9, **_GPU),
    "4xh200": Device("4xh200", 2208e12, 12.5e12, 564e9, 1.5e-3, link=160e9, **_GPU),
}


def _shape(
    vocab: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, tied: bool
) -> ModelConfig:
    return ModelConfig(
        "llama", vocab, hidden, inner, layers, heads, kv_heads, hidden // heads, tie_word_embeddings=tied
    )


# Published shapes: Qwen2.5-0.5B, Llama 3.2 1B, Llama 3.1 8B and 70B.
SHAPES = {
    "0.5b": _shape(151936, 896, 4864, 24, 14, 2, True),
    "1b": _shape(128256, 2048, 8192, 16, 32, 8, True),
    "8b": _shape(128256, 4096, 14336, 32, 32, 8, False),
    "70b": _shape(128256, 8192, 28672, 80, 64, 8, False),
}


class CostModel:
    """Seconds of a forward and of each training unit of one model on one device. Requests' adapters have
    `rank` on all linear layers and cost the way of their weights from memory."""

    def __init__(self, device: Device, config: ModelConfig, rank: int = 16) -> None:
        self.device, self.config = device, config
        self.layers = config.num_layers
        self.overhead, self.launch, self.calls_beside = device.overhead, device.launch, device.calls_beside
        hidden = config.hidden_size
        attention = hidden * (config.num_heads * 2 + config.num_kv_heads * 2) * config.head_dim
        self.layer_weights = attention + 3 * hidden * config.intermediate_size
        self.head_weights = config.vocab_size * hidden
        self.weights = self.layer_weights * self.layers + self.head_weights
        self.weight_bytes = (self.weights + (0 if config.tie_word_embeddings else self.head_weights)) * BYTES
        self.key_bytes = 2 * self.layers * config.num_kv_heads * config.head_dim * BYTES
        heads = (config.num_heads + config.num_kv_heads) * config.head_dim
        widths = 7 * hidden + 2 * heads + 3 * config.intermediate_size  # inputs and outputs of the linears
        self.adapter_bytes = rank * widths * self.layers * BYTES
        self._pair_flops = 4.0 * config.num_heads * config.head_dim

    def forward(
        self, inference: Sequence[InferenceSpan], windows: Sequence[TrainingSpan]
    ) -> tuple[float, float]:
        """All rows of a step through all layers, and logits of those that sample: the seconds, and those of
        them in which the arithmetic waits for memory."""
        flops, moved = self._work(inference, windows)
        seconds = self.device.seconds(flops, moved)
        return seconds, seconds - flops / self.device.flops

    def _work(
        self, inference: Sequence[InferenceSpan], windows: Sequence[TrainingSpan]
    ) -> tuple[float, float]:
        """Operations and bytes."""
        rows = sampled = context = 0
        pairs = 0.0
        adapters: set[str | None] = {None}
        for span in inference:
            length, start = span.length, span.start
            rows += length
            context += start + length
            pairs += length * (start + (length + 1) / 2)
        sampled = sum(span.samples for span in inference)
        adapters.update(span.request.adapter for span in inference)
        for window in windows:
            rows += window.length
            pairs += window.length * (window.start + window.length / 2)
        flops = 2.0 * (self.layer_weights * self.layers * rows + self.head_weights * sampled)
        flops += self._pair_flops * self.layers * pairs
        moved = self.layer_weights * self.layers * BYTES + (self.head_weights * BYTES if sampled else 0)
        moved += context * self.key_bytes + (len(adapters) - 1) * self.adapter_bytes
        return flops, moved

    def request_seconds(self, prompt: int, output: int) -> float:
        """The arithmetic of a request's tokens, were it never to wait for memory."""
        tokens = prompt + output
        flops = 2.0 * (self.layer_weights * self.layers * tokens + self.head_weights * output)
        flops += self._pair_flops * self.layers * tokens * tokens / 2
        return flops / self.device.flops

    def unit(self, kind: str, tokens: int, context: int) -> float:
        """A training unit by the latency model's name for it; `context` keys lie behind a layer's window."""
        if kind in ("loss", "score"):
            passes = 2 if kind == "loss" else 1
            return self.device.seconds(
                2.0 * passes * self.head_weights * tokens, self.head_weights * BYTES * passes
            )
        again = {"layer_a": 0.0, "layer_b": 0.5, "layer_c": 1.0}[kind]
        flops = 2.0 * self.layer_weights * tokens * (1.0 + again)
        flops += 2.5 * self._pair_flops * tokens * (context + tokens / 2)
        return self.device.seconds(flops, self.layer_weights * BYTES * (1.0 + again))
