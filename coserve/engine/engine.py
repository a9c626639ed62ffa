"""The engine: schedule, run, answer, train, commit. `Engine.step` is the product in a few lines."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from functools import partial, singledispatchmethod
from pathlib import Path

import torch

from coserve.config import EngineConfig
from coserve.core.adapter_slots import AdapterSlots
from coserve.core.admission import Admission
from coserve.core.block_pool import BlockPool
from coserve.core.latency_model import LatencyModel
from coserve.core.live_snapshots import LiveSnapshots
from coserve.core.prefix_cache import PrefixCache
from coserve.core.request import Request
from coserve.core.scheduler import Scheduler, SchedulerLimits
from coserve.core.slo import LatencyTargets
from coserve.core.step_plan import StepPlan
from coserve.engine import latency_file
from coserve.engine import messages as m
from coserve.engine.device import memory_plan, resolve_device, resolve_dtype, resolve_threads
from coserve.engine.grammars import Grammars
from coserve.engine.memory_limit import memory_for_adapters, memory_for_jobs, memory_limit_of
from coserve.engine.outbox import Outbox
from coserve.engine.stats import StatsKeeper
from coserve.errors import ContextLengthExceeded, CoserveError
from coserve.grammar import GrammarVocabulary
from coserve.kernels.dispatch import set_batch_invariant
from coserve.log import line
from coserve.lora.adapter_pool import AdapterPool
from coserve.lora.adapter_tiers import AdapterTiers
from coserve.models.config import ModelConfig
from coserve.models.loader import load_model
from coserve.training.job_manager import JobManager
from coserve.training.unit_calls import Stop
from coserve.worker.cuda_graph import CudaGraphs
from coserve.worker.grammar_masks import GrammarMasks
from coserve.worker.kv_tensors import KVTensors
from coserve.worker.model_runner import ModelRunner, StepResult
from coserve.worker.streams import CudaStreams, InOrder, Streams

logger = logging.getLogger(__name__)

TRAINING_ADAPTERS = 8  # adapters in training that may hold rows beside `max_loras` served ones


class Engine:
    """One model on one device, its requests and its jobs.

    `send` takes messages for the server; `arrivals` says whether a message waits, so that a step without
    inference can end early.
    """

    def __init__(
        self, config: EngineConfig, send: Callable[[m.Message], None], arrivals: Callable[[], bool]
    ) -> None:
        self.config = config
        self.send = send
        self.outbox = Outbox(send)
        self.arrivals = arrivals
        self.stopped = False
        self.model_config = ModelConfig.from_dir(config.model)
        torch.set_num_threads(resolve_threads(self.model_config))
        set_batch_invariant(config.deterministic)
        device = resolve_device(config.device)
        dtype = resolve_dtype(config.dtype, self.model_config, device)
        self.decoder = load_model(config.model, device, dtype, config.max_model_len)
        self.max_model_len = config.max_model_len or self.model_config.max_position_embeddings
        max_adapters = config.max_loras + TRAINING_ADAPTERS
        self.pool = AdapterPool(self.model_config, max_adapters * config.max_lora_rank, dtype, device)
        # Last, so that on a GPU the pool is what weights and adapter rows have left.
        num_blocks = memory_plan(config, self.model_config, self.max_model_len, device, dtype)
        self.kv = KVTensors(self.model_config, num_blocks, config.block_size, dtype, device)
        self.blocks = BlockPool(num_blocks, PrefixCache() if config.enable_prefix_caching else None)
        self.slots = AdapterSlots(self.pool.max_rows, max_adapters, on_free=self.pool.free_heads)
        self.adapters = AdapterTiers(
            self.model_config,
            self.pool,
            self.slots,
            max_in_use=config.max_loras,
            max_host=config.max_cpu_loras,
            max_host_bytes=config.max_cpu_lora_memory_bytes or memory_for_adapters(),
            base_head=self.decoder.head,
        )
        self.live = LiveSnapshots(self.slots, self.blocks)
        on_gpu = device.type == "cuda"
        self.model = LatencyModel(overlaps=on_gpu)
        self._setting = latency_file.setting(self.model_config, device, dtype)
        if config.latency_file:
            latency_file.restore(self.model, Path(config.latency_file), self._setting)
        self.scheduler = Scheduler(
            SchedulerLimits(
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=config.max_num_batched_tokens,
                block_size=config.block_size,
                headroom=max(4, num_blocks // 8),
                num_layers=self.model_config.num_layers,
                min_training_share=config.min_training_share,
            ),
            self.blocks,
            self.model,
            LatencyTargets(ttft=config.slo_ttft_ms / 1e3, tpot=config.slo_tpot_ms / 1e3),
            adapter_ready=self.adapters.acquire,
            adapter_released=self.adapters.release,
        )
        self.admission = Admission(self.scheduler, config.max_num_queued_reqs)
        self.streams: Streams = CudaStreams() if on_gpu else InOrder()
        graphs = CudaGraphs() if on_gpu else None
        ends, vocab_size = self.model_config.eos_token_ids, self.model_config.vocab_size
        vocabulary = GrammarVocabulary.from_dir(config.tokenizer or config.model, vocab_size, ends)
        self.masks = GrammarMasks(vocab_size, vocabulary.num_words if vocabulary else 0)
        self.grammars = Grammars(vocabulary, self.masks)
        self.runner = ModelRunner(self.decoder, self.kv, self.pool, self.slots, graphs, self.masks)
        # What the host holds of adapters comes and goes; a job keeps what it has until it ends.
        self.job_memory = memory_for_jobs(device, self.kv.arena.nbytes + self.pool.nbytes)
        self.jobs = JobManager(
            self.decoder,
            self.pool,
            self.slots,
            self.kv,
            self.scheduler.training,
            self.model,
            self.outbox,
            self.live,
            self.outbox,
            self.streams,
            self.job_memory,
        )
        self.stats = StatsKeeper(self)

    # ------------------------------------------------------------------ the step

    @torch.no_grad()
    def step(self) -> None:
        """One step: every sequence owes tokens, the plan says which are paid now."""
        started, forward = time.perf_counter(), 0.0
        self._take_in_adapters()
        self._take_in_grammars()
        plan = self.scheduler.schedule(time.time())
        self.jobs.prepare(plan)
        deadline = started + plan.end
        arrivals = None if plan.inference else self.arrivals
        if not plan.empty:
            self.streams.begin_step()
            result = self.runner.run(plan, self.jobs.microbatches, lambda: self.jobs.calls.begin_beside(plan))
            self.streams.wait()
            forward = time.perf_counter() - started
            self._commit_inference(plan, result)
            ran, beside = self.jobs.calls.end_beside()
            both = time.perf_counter() - started if ran else forward
            windows = self.model.observe_step(
                plan.inference_tokens, plan.context_tokens, plan.window_rows, beside, both
            )
            # Answers are on their way: what is left of the budget belongs to training's own units.
            if plan.apart:
                self._forward_apart(plan, deadline)
            else:
                self.jobs.commit_forward(plan, windows, max(forward - plan.inference_alone, 0.0))
            self.jobs.calls.run_planned(plan, deadline, arrivals, ran)
        self.jobs.advance(deadline, arrivals)
        seconds = time.perf_counter() - started
        self.scheduler.account(seconds, self.jobs.step_seconds, seconds - forward)
        self.stats.step_done(plan, seconds, forward)

    def _forward_apart(self, plan: StepPlan, deadline: float) -> None:
        """Windows in a batch of their own: beside requests while the next piece ends by the deadline, else
        until one arrives."""
        began, rests = time.perf_counter(), Stop(deadline, None if plan.inference else self.arrivals)

        def stop() -> bool:
            self.streams.wait()
            return rests()

        layers = self.runner.run_apart(plan, self.jobs.microbatches, stop)
        seconds = time.perf_counter() - began
        if self.runner.is_resting:
            self.jobs.rest_forward(plan, seconds, seconds / layers)
        else:
            self.jobs.commit_forward(plan, seconds, seconds)

    def _commit_inference(self, plan: StepPlan, result: StepResult) -> None:
        self.scheduler.commit(plan, time.time())
        outputs = []
        for span in plan.inference:
            request = span.request
            if request.finished or not span.samples:
                continue
            failure = result.failed.get(request.sequence_id)
            if failure is not None:
                self.grammars.drop(request)
                self._refuse(request, failure)
                continue
            finish: tuple[str, int | None] | None = ("length", None)
            sampled = result.sampled.get(request.sequence_id)
            if sampled is not None and not request.wants_no_tokens:
                finish = request.append(sampled.token_id)
                self.masks.advance(request, sampled.token_id)
            outputs.append(self._output(request, result, finish))
            if finish is not None:
                self._finish(request)
        if outputs:
            self.send(m.StepOutputs(outputs=outputs))

    def _output(
        self, request: Request, result: StepResult, finish: tuple[str, int | None] | None
    ) -> m.RequestOutput:
        sampled = result.sampled.get(request.sequence_id)
        tokens = [] if sampled is None or request.wants_no_tokens else [sampled.token_id]
        first = request.num_output_tokens == len(tokens)
        logprobs = []
        if tokens and sampled is not None and sampled.logprobs is not None:
            logprobs = [m.TokenLogprobs(*sampled.logprobs)]
        prompt = self.runner.take_prompt_logprobs(request) if first else None
        return m.RequestOutput(
            request_id=request.sequence_id,
            token_ids=tokens,
            logprobs=logprobs,
            prompt_logprobs=None if prompt is None else [p and m.TokenLogprobs(*p) for p in prompt],
            finish_reason=finish[0] if finish else None,
            stop_token_id=finish[1] if finish else None,
            cached_tokens=request.num_cached_tokens,
            num_preemptions=request.num_preemptions,
            scheduled_at=request.scheduled_at if first else None,
            snapshot=request.adapter if first and request.adapter in self.live else None,
        )

    def _finish(self, request: Request) -> None:
        self.scheduler.finish(request)
        self.masks.forget(request)
        self.adapters.unwant(request.sequence_id)
        self._release_live(request)

    def _refuse(self, request: Request, error: CoserveError) -> None:
        self._finish(request)
        self.outbox.refuse(request.sequence_id, error)

    def _release_live(self, request: Request) -> None:
        if request.adapter is not None and request.adapter in self.live:
            self.live.release(request.adapter, request.block_hashes)

    def _take_in_adapters(self) -> None:
        failed = self.adapters.poll(busy=bool(self.scheduler.running))
        if not failed:
            return
        for request in [r for r in self.scheduler.waiting if r.adapter in failed]:
            self._refuse(request, failed[request.adapter or ""])

    def _take_in_grammars(self) -> None:
        for request, error in self.grammars.poll() if self.grammars.is_compiling else ():
            self._refuse(request, error)

    # ------------------------------------------------------------------ messages

    @property
    def has_work(self) -> bool:
        """A step would do something now."""
        scheduler = self.scheduler
        waits_for_load = len(scheduler.waiting) == scheduler.num_deferred and self.is_loading
        return bool(
            scheduler.running or (scheduler.waiting and not waits_for_load) or self.jobs.has_work
        )

    @property
    def is_loading(self) -> bool:
        """Adapters are on their way to the device, or a grammar is being compiled."""
        return self.adapters.is_loading or self.grammars.is_compiling

    @singledispatchmethod
    def handle(self, message: object) -> None:
        """Act on a message of the server, between two steps."""
        raise TypeError(f"no handler for {type(message).__name__}")

    @handle.register
    def _(self, message: m.AddRequest) -> None:
        ref = message.adapter
        adapter = ref.digest if ref else None
        if message.live_job:
            try:
                adapter = self.jobs.read_live(message.live_job)
            except CoserveError as error:
                self.outbox.refuse(message.request_id, error)
                return
        request = Request(
            message.request_id,
            message.prompt_token_ids,
            message.sampling,
            adapter=adapter,
            priority=message.priority,
            targets=message.targets,
            tenant=message.tenant,
            weight=message.weight,
            arrival=message.arrival,
            cache_salt=message.cache_salt,
            eos_token_ids=self.model_config.eos_token_ids,
            max_model_len=self.max_model_len,
        )
        needed = -(-min(request.num_prompt_tokens + 1, self.max_model_len) // self.config.block_size)
        try:
            if needed > self.blocks.num_blocks:
                reason = "The prompt is larger than the server's KV cache."
                raise ContextLengthExceeded(reason, param="prompt")
            self.grammars.check(request)
            self.stats.arrived(message.arrival)
            self.admission.check(request, time.time())
        except CoserveError as error:
            self._release_live(request)
            self.outbox.refuse(message.request_id, error)
            return
        if ref is not None:
            self.adapters.want(message.request_id, ref.digest, ref.name, ref.path, request.order)
        self.scheduler.add(request)
        self.grammars.add(request)

    @handle.register
    def _(self, message: m.AbortRequests) -> None:
        ended = []
        for request_id in message.request_ids:
            request = self.scheduler.get(request_id)
            if request is not None:
                self._finish(request)
                self.runner.forget(request)
                logger.info(line("request aborted", id=request_id, tokens=request.num_output_tokens))
                ended.append(m.RequestOutput(request_id=request_id, finish_reason="abort"))
        if ended:
            self.send(m.StepOutputs(outputs=ended))

    @handle.register
    def _(self, message: m.LoadAdapter) -> None:
        ref = message.adapter
        self.adapters.know(ref.digest, ref.name, ref.path)
        if message.job_id:
            self.adapters.adopt(ref.digest, message.job_id)
        self.adapters.load(ref.digest, message.pinned, partial(self.outbox.reply, message.call_id))

    @handle.register
    def _(self, message: m.UnloadAdapter) -> None:
        self.outbox.answer(message.call_id, lambda: self.adapters.unload(message.digest))

    @handle.register
    def _(self, message: m.SubmitJob) -> None:
        self.outbox.answer(message.call_id, lambda: self.jobs.submit(message.spec))

    @handle.register
    def _(self, message: m.ControlJob) -> None:
        self.outbox.answer(message.call_id, lambda: self.jobs.control(message.job_id, message.action))

    @handle.register
    def _(self, message: m.OpenModel) -> None:
        self.outbox.failing(message.call_id, lambda: self.jobs.models.open(message.spec, message.call_id))

    @handle.register
    def _(self, message: m.CallModel) -> None:
        call_id, models = message.call_id, self.jobs.models
        self.outbox.failing(call_id, lambda: models.call(message.model_id, call_id, message.call))

    @handle.register
    def _(self, message: m.CloseModel) -> None:
        self.outbox.answer(message.call_id, lambda: self.jobs.models.close(message.model_id))

    @handle.register
    def _(self, message: m.GetStats) -> None:
        self.send(self.stats.snapshot(message.call_id))

    @handle.register
    def _(self, message: m.Shutdown) -> None:
        self.outbox.answer(message.call_id, self.stop)

    def saved_costs(self) -> str:
        """What the latency model has learnt, as the text of its file."""
        return latency_file.encode(self.model, self._setting)

    def stop(self) -> None:
        """Checkpoint what trains, hand over what was learnt, and leave the loop."""
        self.jobs.checkpoint_all()
        self.send(self.stats.snapshot(0, with_costs=True))
        self.adapters.close()
        self.grammars.close()
        self.stopped = True

    def describe(self) -> m.EngineReady:
        """What the server wants to know once the model is loaded."""
        return m.EngineReady(
            pid=os.getpid(),
            model_name=self.config.served_model_name or os.path.basename(os.path.normpath(self.config.model)),
            max_model_len=self.max_model_len,
            vocab_size=self.model_config.vocab_size,
            num_blocks=self.blocks.num_blocks,
            block_size=self.config.block_size,
            device=str(self.kv.device),
            dtype=str(self.kv.dtype).removeprefix("torch."),
            memory_limit_bytes=memory_limit_of(self.kv.device),
            job_memory_bytes=self.job_memory,
        )
