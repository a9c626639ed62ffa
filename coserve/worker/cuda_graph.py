"""CUDA graphs of the decoder's pass: decode and prefill rows of one step, padded to a bucket of tokens.

A bucket has a batch whose tensors stay in place. Its pass is captured when it is first needed and after that
a step writes its numbers, copies them to the device in one piece and replays. Padding rows have no slot,
padding sequences no tokens, padding LoRA segments rank 0, so kernels pass over them. Nothing in the pass
waits for the device or depends on numbers that only the device knows. Steps with training windows run without
graphs (docs/decisions.md), and so does what follows the layers: norm, head and its adapters, sampling.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from math import prod
from typing import Protocol

import torch

from coserve.core.step_plan import StepPlan
from coserve.kernels.lora import LoraSegments
from coserve.layers.batch import ForwardBatch, InferenceRows, LoraBatch
from coserve.lora.adapter_pool import AdapterPool
from coserve.models.decoder import Decoder
from coserve.worker.forward_batch import AdapterRows, build_forward_batch
from coserve.worker.kv_tensors import ALIGNMENT, KVTensors

MOST_TOKENS = 512  # of a bucket; a larger step has work enough to hide its launches
MOST_SEGMENTS = 32  # LoRA segments; inference rows come ordered by adapter
FEWEST_BLOCKS = 16  # columns of a bucket's block table; further ones double
MOST_GRAPHS = 96
CPU = torch.device("cpu")

Run = Callable[[], torch.Tensor]


class Graphs(Protocol):
    """What is asked of the device."""

    def capture(self, run: Run) -> Run:
        """`run` as something that does the same again, on the same memory, with the same result tensor."""
        ...

    def mark(self) -> Callable[[], None]:
        """A function that waits until the device has done all that was asked of it so far."""
        ...


class CudaGraphs:
    """torch's graphs; all share one pool, since a result is read before the next replay."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, run: Run) -> Run:
        """Runs once before: kernels are compiled and workspaces made outside of the graph."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = run()

        def play() -> torch.Tensor:
            graph.replay()
            return result

        return play

    def mark(self) -> Callable[[], None]:
        event = torch.cuda.Event()
        event.record()
        return event.synchronize


class Staging:
    """Tables of fixed shape, written on the host (pinned beside a GPU) and copied in one piece."""

    def __init__(self, device: torch.device, **tables: tuple[tuple[int, ...], torch.dtype]) -> None:
        ends, end = {}, 0
        for name, (shape, dtype) in tables.items():
            ends[name] = end
            end += -(-prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        self._host = torch.zeros(end, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._device = torch.zeros(end, dtype=torch.uint8, device=device)
        self.host, self.device = (
            {
                name: memory[ends[name] : ends[name] + prod(shape) * dtype.itemsize].view(dtype).view(shape)
                for name, (shape, dtype) in tables.items()
            }
            for memory in (self._host, self._device)
        )

    def upload(self) -> None:
        """The device gets what was written; the host's tables must stay until it has them."""
        self._device.copy_(self._host, non_blocking=True)


class Bucket:
    """At most `tokens` rows of `sequences` sequences, of `blocks` blocks each; with adapters or without."""

    def __init__(
        self, decoder: Decoder, kv: KVTensors, pool: AdapterPool, tokens: int, blocks: int, adapted: bool
    ) -> None:
        self._decoder = decoder
        self._tokens = tokens
        segments, long, short = min(tokens, MOST_SEGMENTS), torch.int64, torch.int32
        layers, modules = pool.num_layers, pool.num_modules
        self._staging = Staging(
            kv.device,
            token_ids=((tokens,), long),
            positions=((tokens,), long),
            slots=((tokens,), long),
            block_tables=((tokens, blocks), short),
            query_start=((tokens + 1,), short),
            context_lens=((tokens,), short),
            token_start=((segments,), short),
            token_end=((segments,), short),
            row_offset=((segments,), short),
            rows=((pool.max_rows,), short),
            ranks=((layers, modules, segments), short),
        )
        made = self._staging.device
        inference = InferenceRows(
            tokens, made["slots"], made["block_tables"], made["query_start"], made["context_lens"], kv
        )
        lora = None
        if adapted:
            tables = LoraSegments(made["token_start"], made["token_end"], made["row_offset"], made["rows"])
            everywhere = [[True] * modules for _ in range(layers)]
            lora = LoraBatch(tables, made["ranks"], pool, adapted=everywhere)
        self._batch = ForwardBatch(made["token_ids"], made["positions"], inference, [], lora)
        self._play: Run | None = None
        self._wait: Callable[[], None] | None = None

    def forward(self, given: ForwardBatch, graphs: Graphs) -> torch.Tensor:
        """[tokens, H] before the final norm, of a batch on the host; rows beyond its own are anything."""
        if self._wait is not None:
            self._wait()
        self._write(given)
        self._staging.upload()
        self._wait = graphs.mark()
        if self._play is None:
            self._play = graphs.capture(lambda: self._decoder.forward(self._batch))
        return self._play()

    def _write(self, given: ForwardBatch) -> None:
        host, rows = self._staging.host, given.inference
        assert rows is not None
        sequences, width = rows.block_tables_SB.shape
        _fill(host["token_ids"], given.token_ids_T, 0)
        _fill(host["positions"], given.positions_T, 0)
        _fill(host["slots"], rows.slots_T, -1)
        _fill(host["query_start"], rows.query_start_S1, rows.rows)
        _fill(host["context_lens"], rows.context_lens_S, 0)
        host["block_tables"][:sequences, :width] = rows.block_tables_SB
        if given.lora is not None:
            segments = given.lora.segments
            for name in ("token_start", "token_end", "row_offset", "rows"):
                _fill(host[name], getattr(segments, name), 0)
            host["ranks"].zero_()
            host["ranks"][..., : len(segments)] = given.lora.ranks_LMS


def _fill(table: torch.Tensor, values: torch.Tensor, padding: int) -> None:
    table[: len(values)] = values
    table[len(values) :] = padding


class BucketedForward:
    """The decoder's pass by graphs, for the steps that fit a bucket."""

    def __init__(
        self, decoder: Decoder, kv: KVTensors, pool: AdapterPool, slots: AdapterRows, graphs: Graphs
    ) -> None:
        self._decoder, self._kv, self._pool, self._slots = decoder, kv, pool, slots
        self._graphs = graphs
        self._buckets: OrderedDict[tuple[int, int, bool], Bucket] = OrderedDict()

    def forward(self, plan: StepPlan) -> torch.Tensor | None:
        """[T or more, H] before the final norm; None for a step that no bucket takes."""
        if plan.training_forward or not 0 < plan.inference_tokens <= MOST_TOKENS:
            return None
        batch = build_forward_batch(plan, {}, self._kv, self._pool, self._slots, CPU)
        assert batch.inference is not None
        if batch.lora is not None and len(batch.lora.segments) > MOST_SEGMENTS:
            return None
        tokens = _power_of_two(plan.inference_tokens)
        blocks = max(FEWEST_BLOCKS, _power_of_two(batch.inference.block_tables_SB.shape[1]))
        key = (tokens, blocks, batch.lora is not None)
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = Bucket(self._decoder, self._kv, self._pool, *key)
            if len(self._buckets) > MOST_GRAPHS:
                self._buckets.popitem(last=False)
        self._buckets.move_to_end(key)
        return bucket.forward(batch, self._graphs)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
