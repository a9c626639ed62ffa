"""A scheduler and a model runner on a tiny random model: what the engine does, without processes and jobs."""

from __future__ import annotations

from pathlib import Path

import torch

from coserve.core.adapter_slots import AdapterSlots
from coserve.core.block_pool import BlockPool
from coserve.core.latency_model import LatencyModel
from coserve.core.prefix_cache import PrefixCache
from coserve.core.request import Request
from coserve.core.sampling_params import SamplingParams
from coserve.core.scheduler import Scheduler, SchedulerLimits
from coserve.core.slo import LatencyTargets
from coserve.lora.adapter import load_adapter
from coserve.lora.adapter_pool import AdapterPool
from coserve.models.decoder import Decoder
from coserve.worker.kv_tensors import KVTensors
from coserve.worker.model_runner import ModelRunner
from coserve.worker.sampler import TokenLogprob

MAX_LEN = 64


class Generation:
    """Requests go in with `add`; `run` steps until all are answered."""

    def __init__(
        self,
        decoder: Decoder,
        *,
        max_tokens: int = 16,
        max_num_seqs: int = 8,
        blocks: int = 64,
        prefix_caching: bool = False,
    ) -> None:
        config = decoder.config
        self.kv = KVTensors(config, blocks, 4, decoder.dtype)
        # Fresh memory may hold anything; nothing that wasn't written may be read.
        self.kv.arena.view(decoder.dtype).fill_(float("nan"))
        self.pool = AdapterPool(config, 32, decoder.dtype)
        self.slots = AdapterSlots(32, 4)
        self.config = config
        self.scheduler = Scheduler(
            SchedulerLimits(max_num_seqs, max_tokens, 4, 2),
            BlockPool(blocks, PrefixCache() if prefix_caching else None),
            LatencyModel(),
            LatencyTargets(),
            adapter_ready=self._acquire,
            adapter_released=self.slots.release,
        )
        self.runner = ModelRunner(decoder, self.kv, self.pool, self.slots)
        self.requests: dict[str, Request] = {}
        self.logprobs: dict[str, list[TokenLogprob | None]] = {}
        self.prompt_logprobs: dict[str, list[TokenLogprob | None] | None] = {}
        self.preemptions = 0
        self.batched_adapters = 0

    def load(self, key: str, path: Path) -> None:
        """Bring a PEFT directory to the device under `key`."""
        adapter = load_adapter(path, self.config)
        got = self.slots.allocate(key, adapter.rank)
        assert got is not None
        self.pool.write(got[0].rows, adapter)

    def add(self, name: str, prompt: list[int], *, adapter: str | None = None, **sampling: object) -> Request:
        """Queue a request; greedy unless `sampling` says otherwise."""
        params = SamplingParams(**{"temperature": 0.0, "max_tokens": 8, **sampling})
        request = Request(
            name, prompt, params, adapter=adapter, arrival=len(self.requests), max_model_len=MAX_LEN
        )
        self.requests[name] = request
        self.scheduler.add(request)
        return request

    def step(self) -> None:
        """Schedule, run, commit."""
        plan = self.scheduler.schedule(0.0)
        self.preemptions += len(plan.preempted)
        self.batched_adapters = max(
            self.batched_adapters, len({span.request.adapter for span in plan.inference})
        )
        result = self.runner.run(plan, {})
        self.scheduler.commit(plan, 0.0)
        for span in plan.inference:
            request = span.request
            if request.finished or not span.samples:
                continue
            if request.sequence_id not in self.prompt_logprobs:
                self.prompt_logprobs[request.sequence_id] = self.runner.take_prompt_logprobs(request)
            done = True
            if request.sequence_id in result.sampled:
                sampled = result.sampled[request.sequence_id]
                self.logprobs.setdefault(request.sequence_id, []).append(sampled.logprobs)
                done = request.append(sampled.token_id) is not None
            if done:
                self.scheduler.finish(request)

    def run(self) -> dict[str, list[int]]:
        """Output ids of all requests, once all are finished."""
        for _ in range(2000):
            if all(request.finished for request in self.requests.values()):
                return {
                    name: request.token_ids[request.num_prompt_tokens :]
                    for name, request in self.requests.items()
                }
            self.step()
        raise AssertionError("the requests never finish")

    def _acquire(self, key: str) -> bool:
        self.slots.acquire(key)
        return True


def quiet_torch() -> None:
    """Two threads at most, so that tests don't fight for cores."""
    torch.set_num_threads(min(2, torch.get_num_threads()))
