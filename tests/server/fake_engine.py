"""An engine without a model: answers every request with a set text, and "trains" at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import numpy as np

from coserve.config import DEMO_MODEL_DIR, EngineConfig
from coserve.engine import messages as m
from coserve.engine.client import JobEvent
from coserve.engine.readiness import Readiness
from coserve.errors import CoserveError, InvalidRequest, NotFound, Unavailable
from coserve.lora.peft_files import make_config, tensor_key, write_adapter
from coserve.models.config import LINEAR_MODULES, ModelConfig
from coserve.tokenizer import Tokenizer
from coserve.training.job import JobSpec, StepMetrics
from coserve.training.model_calls import CallResult, ModelCall, Pass, Save, Update

MODEL = ModelConfig.from_dir(DEMO_MODEL_DIR)
TOKENIZER = Tokenizer.from_dir(DEMO_MODEL_DIR)
EOS = TOKENIZER.eos_token_ids[0]
DEFAULT_REPLY = "Grüße, 世界 👋! All is well."


def write_peft(
    directory: Path, seed: int = 0, rank: int = 4, modules: tuple[str, ...] = ("q_proj", "v_proj")
) -> Path:
    """A valid PEFT directory for the demo model's shapes."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for layer in range(MODEL.num_layers):
        for name in modules:
            out_features, in_features = MODEL.module_shape(name)
            path = MODEL.module_path(layer, name)
            tensors[tensor_key(path, "A")] = rng.standard_normal((rank, in_features), dtype=np.float32)
            tensors[tensor_key(path, "B")] = rng.standard_normal((out_features, rank), dtype=np.float32)
    write_adapter(directory, tensors, make_config(r=rank, lora_alpha=2 * rank, target_modules=list(modules)))
    return directory


class FakeEngine(Readiness):
    """Implements what the server uses of EngineClient."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        super().__init__()
        self.info: m.EngineReady | None = None
        self.reply = DEFAULT_REPLY
        self.requests: list[m.AddRequest] = []
        self.aborted: list[str] = []
        self.loaded: dict[str, m.AdapterRef] = {}
        self.pinned: set[str] = set()  # digests
        self.jobs: dict[str, JobSpec] = {}
        self.models: dict[str, JobSpec] = {}
        self.calls: list[tuple[str, ModelCall]] = []
        self.fail_call: CoserveError | None = None
        self.hold_calls = asyncio.Event()
        self.hold_calls.set()
        self.hold = asyncio.Event()
        self.hold.set()
        self.auto_train = True
        self.fail_load: CoserveError | None = None
        self.fail_after: int | None = None
        self.refusal: CoserveError | None = None
        self.on_job_event: Callable[[object], Awaitable[None]]
        self.on_stats: Callable[[m.EngineStats], None] = lambda stats: None
        self.on_lost: Callable[[], None] = lambda: None
        self.on_restart: Callable[[], Awaitable[None]]
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> m.EngineReady:
        self.info = m.EngineReady(
            pid=1,
            model_name=self.config.served_model_name,
            max_model_len=256,
            vocab_size=MODEL.vocab_size,
            num_blocks=64,
            block_size=16,
            device="cpu",
            dtype="float32",
        )
        self.ready = True
        return self.info

    async def shutdown(self, timeout: float) -> None:
        self.ready = False
        for task in self._tasks:
            task.cancel()

    # ------------------------------------------------------------------ requests

    async def generate(self, add: m.AddRequest) -> AsyncIterator[m.RequestOutput]:
        if not self.ready:
            raise Unavailable("The engine is starting.")
        self.requests.append(add)
        if self.refusal is not None:
            raise self.refusal
        finished = False
        try:
            for place, output in enumerate(self._outputs(add)):
                if place:
                    await self.hold.wait()
                await asyncio.sleep(0)
                if self.fail_after is not None and len(output.token_ids) and self.fail_after <= 0:
                    raise Unavailable("The engine stopped and is being restarted.")
                if self.fail_after is not None:
                    self.fail_after -= 1
                finished = output.finish_reason is not None
                yield output
        finally:
            if not finished:
                self.aborted.append(add.request_id)

    def _outputs(self, add: m.AddRequest) -> list[m.RequestOutput]:
        sampling = add.sampling
        limit = sampling.max_tokens
        tokens = [*TOKENIZER.encode(self.reply, add_special_tokens=False), EOS]
        if sampling.ignore_eos:
            tokens = (tokens[:-1] * (limit // max(1, len(tokens) - 1) + 1))[:limit]
        stopped = [place for place, token in enumerate(tokens) if token in sampling.stop_token_ids]
        tokens = tokens[: stopped[0] + 1] if stopped else tokens
        cut = tokens[:limit]
        prompt = None
        if sampling.prompt_logprobs is not None:
            rest = [self._logprobs(t, sampling.prompt_logprobs) for t in add.prompt_token_ids[1:]]
            prompt = [None, *rest]
        if not cut:
            return [
                m.RequestOutput(request_id=add.request_id, prompt_logprobs=prompt, finish_reason="length")
            ]
        outputs = []
        for place, token in enumerate(cut):
            last = place == len(cut) - 1
            ended = last and len(cut) == len(tokens) and (token == EOS or bool(stopped))
            outputs.append(
                m.RequestOutput(
                    request_id=add.request_id,
                    token_ids=[token],
                    logprobs=[] if sampling.logprobs is None else [self._logprobs(token, sampling.logprobs)],
                    prompt_logprobs=prompt if place == 0 else None,
                    finish_reason=("stop" if ended else "length") if last else None,
                    stop_token_id=token if ended else None,
                    scheduled_at=add.arrival if place == 0 else None,
                    snapshot=f"{add.live_job}:live@3" if place == 0 and add.live_job else None,
                )
            )
        return outputs

    def _logprobs(self, token: int, top: int) -> m.TokenLogprobs:
        return m.TokenLogprobs(token, -0.5, 1, [(token + k, -0.5 - k) for k in range(top)])

    # ------------------------------------------------------------------ adapters and jobs

    async def load_adapter(self, ref: m.AdapterRef, pinned: bool = False, job_id: str = "") -> None:
        if self.fail_load is not None:
            raise self.fail_load
        self.loaded[ref.digest] = ref
        (self.pinned.add if pinned else self.pinned.discard)(ref.digest)

    async def unload_adapter(self, digest: str) -> None:
        self.loaded.pop(digest, None)
        self.pinned.discard(digest)

    async def submit_job(self, spec: JobSpec) -> None:
        if spec.job_id in self.jobs:
            raise InvalidRequest("runs already")
        self.jobs[spec.job_id] = spec
        await self.emit(m.JobStatus(job_id=spec.job_id, status="paused" if spec.paused else "running"))
        if self.auto_train and not spec.paused:
            self._later(self.train(spec.job_id))

    async def open_model(self, spec: JobSpec) -> None:
        await self.hold_calls.wait()
        self.models[spec.job_id] = spec

    async def close_model(self, model_id: str) -> None:
        if self.models.pop(model_id, None) is None:
            raise NotFound("no such model")

    async def call_model(self, model_id: str, call: ModelCall) -> CallResult:
        """Every target has the log-probability -0.5; saves hold a valid adapter."""
        assert model_id in self.models
        self.calls.append((model_id, call))
        await self.hold_calls.wait()
        if self.fail_call is not None:
            raise self.fail_call
        if isinstance(call, Pass):
            logprobs = [np.full(len(datum.targets) // 4, -0.5, "<f4").tobytes() for datum in call.data]
            widths = [datum.width for datum in call.data] if call.is_wide else []
            return CallResult(logprobs=logprobs, widths=widths, metrics={"loss:sum": 1.5})
        if isinstance(call, Save):
            write_peft(Path(call.directory), seed=len(self.calls))
        return CallResult(metrics={"grad_norm:mean": 2.0} if isinstance(call, Update) else {})

    async def control_job(self, job_id: str, action: str) -> None:
        if job_id not in self.jobs:
            raise NotFound("no such job")
        status = {"cancel": "cancelled", "pause": "paused", "resume": "running"}[action]
        self._later(self.emit(m.JobStatus(job_id=job_id, status=status)))
        if action == "cancel":
            del self.jobs[job_id]

    def _later(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def emit(self, event: JobEvent) -> None:
        await self.on_job_event(event)

    def metrics(self, step: int, total: int, loss: float | None = None) -> StepMetrics:
        return StepMetrics(
            step=step,
            total_steps=total,
            epoch=step / total,
            loss=2.0 / step if loss is None else loss,
            learning_rate=1e-4,
            grad_norm=1.0,
            trained_tokens=10,
            tokens=40,
            tokens_per_second=80.0,
            accuracy=step / 4,
            valid_loss=3.0 if step == 1 else None,
            valid_accuracy=0.125 if step == 1 else None,
        )

    async def step(self, job_id: str, step: int, total: int, loss: float | None = None) -> None:
        await self.emit(m.JobProgress(job_id=job_id, metrics=self.metrics(step, total, loss)))

    async def checkpoint(self, job_id: str, step: int) -> Path:
        path = Path(self.jobs[job_id].checkpoint_dir) / f"step-{step:06d}"
        if not path.exists():
            write_peft(path, seed=step, modules=LINEAR_MODULES)
        kept = sorted(int(folder.name.removeprefix("step-")) for folder in path.parent.glob("step-*"))[-3:]
        await self.emit(
            m.JobCheckpoint(job_id=job_id, step=step, path=str(path), train_loss=2.0 / step, kept=kept)
        )
        return path

    async def train(self, job_id: str, steps: int = 3) -> None:
        for step in range(1, steps + 1):
            await self.step(job_id, step, steps)
        path = await self.checkpoint(job_id, steps)
        await self.emit(m.JobStatus(job_id=job_id, status="succeeded", result_path=str(path)))
        self.jobs.pop(job_id, None)

    async def stats(self) -> m.EngineStats:
        return m.EngineStats(memory_bytes={"weights": 5})
