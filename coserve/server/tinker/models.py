"""The models in training: made, called in the order of their calls' numbers, unloaded.

A call carries a seq_id, counted from 1 for each model; one that comes early waits for those before it. The
engine is told of them in that order and does them in it, so nothing here waits for an answer before it sends
the next call, but for those that begin a model.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from msgspec.structs import replace

from coserve.engine.client import EngineClient
from coserve.errors import (
    CoserveError,
    FailedPrecondition,
    Gone,
    InternalError,
    InvalidRequest,
    NotFound,
    RateLimited,
)
from coserve.metrics import Metrics
from coserve.server.auth import Authenticator, Key, owns
from coserve.server.tinker.answers import Answer, pass_answer, plain
from coserve.server.tinker.futures import Future, Futures
from coserve.server.tinker.runs import SAMPLER, WEIGHTS, Runs
from coserve.server.tinker.sessions import Session
from coserve.server.tinker.store import Run, Saved
from coserve.training.job import JobSpec, TrainingSpec
from coserve.training.model_calls import Load, ModelCall, Pass, Save, Update

MAX_AHEAD = 4096  # calls of one model that wait for one before them
MAX_EPHEMERAL = 64  # saves of one model that go with its session; the oldest make room
_RETRY = 30.0

Work = Callable[[], Awaitable[Answer]]


@dataclass
class _Call:
    """What is to be done for a future; `alone`: nothing behind it begins before it is over."""

    future: Future
    work: Work
    alone: bool = False


class TrainedModel:
    """A model of a session. `engine` says which of the engine's lives holds it."""

    def __init__(self, run: Run, session: Session, futures: Futures) -> None:
        self.run, self.session, self._futures = run, session, futures
        self.engine = 0
        self.trained_tokens = 0  # of passes since the last update, that counted in the loss
        self.ephemeral: list[Saved] = []
        self._next = 1
        self._skipped: set[int] = set()
        self._early: dict[int, _Call] = {}
        self._calls: asyncio.Queue[_Call] = asyncio.Queue()
        self._worker = asyncio.create_task(self._run())

    @property
    def id(self) -> str:
        """Its name."""
        return self.run.id

    def next_free(self) -> int:
        """The number of a call that has none."""
        return max([self._next, *(seq + 1 for seq in self._early)])

    def is_early(self, seq: int) -> bool:
        """Calls before this number haven't come."""
        return seq > self._next

    def skip(self, seq: int) -> None:
        """A call with this number was refused: those behind need not wait for it."""
        if seq == self._next:
            self._skipped.add(seq)
            self._advance()
        elif seq > self._next and len(self._skipped) < MAX_AHEAD:
            self._skipped.add(seq)

    def check(self, seq: int) -> None:
        """Gone for the number of a call that was done and is forgotten, InvalidRequest for one far ahead."""
        if seq < self._next and seq not in self._skipped:
            raise Gone(f"The call with seq_id {seq} was done, and its answer is forgotten.", param="seq_id")
        if seq >= self._next + MAX_AHEAD:
            raise InvalidRequest(
                f"seq_id is {seq}, and the next call of this model is {self._next}.", param="seq_id"
            )

    def add(self, seq: int, call: _Call) -> None:
        """Do it in its turn; 0 comes before the first."""
        if seq < self._next:
            self._skipped.discard(seq)
            self._calls.put_nowait(call)
        else:
            self._early[seq] = call
            self._skipped.discard(seq)
            self._advance()

    def _advance(self) -> None:
        while self._next in self._early or self._next in self._skipped:
            if self._next in self._early:
                call = self._early.pop(self._next)
                self._futures.in_turn(call.future)
                self._calls.put_nowait(call)
            self._next += 1

    async def _run(self) -> None:
        while True:
            call = await self._calls.get()
            task = self._futures.begin(call.future, call.work())
            if call.alone:
                await asyncio.wait({task})
            else:
                await asyncio.sleep(0)  # it begins now, and has told the engine

    def close(self) -> None:
        """Nothing more is done."""
        self._worker.cancel()
        error = FailedPrecondition(f"The model {self.id} was unloaded.", param="model_id")
        waiting = list(self._early.values())
        while not self._calls.empty():
            waiting.append(self._calls.get_nowait())
        for call in waiting:
            self._futures.fail(call.future, error)
        self._early.clear()


class Models:
    """Those of one server, by id."""

    def __init__(
        self, engine: EngineClient, auth: Authenticator, metrics: Metrics, runs: Runs, futures: Futures
    ) -> None:
        self._engine, self._auth, self._metrics = engine, auth, metrics
        self._runs, self._futures = runs, futures
        self._by_id: dict[str, TrainedModel] = {}

    def get(self, model_id: str, key: Key | None) -> TrainedModel:
        """One of this key's; NotFound."""
        model = self._by_id.get(model_id)
        if model is None or not owns(key, model.run.tenant):
            raise NotFound(f"There is no model {model_id[:200]!r}.", param="model_id")
        return model

    def of(self, session: Session) -> list[TrainedModel]:
        """A session's."""
        return [model for model in self._by_id.values() if model.session is session]

    # ------------------------------------------------------------------ beginning and ending

    def create(
        self, run: Run, session: Session, digest: bytes, start: Saved | None, optimizer: bool
    ) -> Future:
        """A new model, from its seed or from what was saved; the same future for the same request again.

        Raises InvalidRequest for a number that another model has, RateLimited when the key has as many jobs
        and models as it may.
        """
        request_id = f"{run.id}:0"
        known = self._futures.known(request_id, digest)
        if known is not None:
            return known
        if run.id in self._by_id or run.id in session.model_ids:
            raise InvalidRequest("This model_seq_id is another model's.", param="model_seq_id")
        self._check_number(session.key)
        future = self._futures.make(request_id, session.id, run.tenant, digest)
        future.queue_state = "paused_capacity"
        future.reason = "the model waits for adapter rows or memory"
        model = self._by_id[run.id] = TrainedModel(run, session, self._futures)
        session.model_ids.append(run.id)

        async def begin() -> Answer:
            try:
                await self._open(model)
                if start is not None:
                    await self._call(model, Load(directory=start.folder, optimizer=optimizer))
                await self._runs.put(run)
            except CoserveError:
                await self.unload(model)
                raise
            if start is not None:
                return plain(type="load_weights", path=start.path, model_id=run.id)
            return plain(type="create_model", model_id=run.id)

        model.add(0, _Call(future, begin, alone=True))
        return future

    def _check_number(self, key: Key | None) -> None:
        if key is None or not key.max_jobs:
            return
        own = sum(1 for model in self._by_id.values() if model.run.tenant == key.tenant)
        if own >= key.max_jobs:
            raise RateLimited(
                f"This API key has {own} models in training, as many as it may; unload one.",
                retry_after=_RETRY,
                code="max_jobs_exceeded",
            )

    async def _open(self, model: TrainedModel) -> None:
        run = model.run
        spec = JobSpec(
            job_id=run.id,
            data_path="",
            checkpoint_dir="",
            seed=run.seed,
            lora=run.lora,
            training=TrainingSpec(max_grad_norm=0.0),
            base_model_name=run.base_model,
            tenant=run.tenant,
            share=self._auth.weight(run.tenant),
            method="calls",
        )
        model.engine = self._life()  # from now on an unload has to tell it
        await self._engine.open_model(spec)

    def _life(self) -> int:
        return self._engine.info.pid if self._engine.info is not None else 0

    async def unload(self, model: TrainedModel) -> None:
        """Forget a model; its saves stay, but for the ephemeral ones, which stay until the session ends."""
        self.forget(model)
        if model.engine == self._life():
            with contextlib.suppress(CoserveError):
                await self._engine.close_model(model.id)

    def unload_later(self, model: TrainedModel) -> Future:
        """As `unload`, with a future; the same one when it is asked for again."""
        request_id = f"{model.id}:unload"
        known = self._futures.known(request_id, b"")
        if known is not None:
            return known
        future = self._futures.make(request_id, model.session.id, model.run.tenant, b"")

        async def work() -> Answer:
            await self.unload(model)
            return plain(type="unload_model", model_id=model.id)

        self._futures.begin(future, work())
        return future

    def forget(self, model: TrainedModel) -> None:
        """Nothing more is done with it here."""
        self._by_id.pop(model.id, None)
        model.close()

    # ------------------------------------------------------------------ calls

    def submit(
        self,
        model: TrainedModel,
        seq: int | None,
        digest: bytes,
        work: Work,
        *,
        held: int = 0,
        alone: bool = False,
    ) -> Future:
        """Do `work`, of a request of `held` bytes, in the turn of its number; the same future for the same
        request again."""
        number = model.next_free() if seq is None else seq
        request_id = f"{model.id}:{number}"
        known = self._futures.known(request_id, digest)
        if known is not None:
            return known
        model.check(number)
        session, tenant, early = model.session.id, model.run.tenant, model.is_early(number)
        future = self._futures.make(request_id, session, tenant, digest, held=held, early=early)
        model.run = replace(model.run, seen_at=time.time())
        self._runs.seen(model.run)
        model.add(number, _Call(future, work, alone))
        return future

    async def _call(self, model: TrainedModel, call: ModelCall) -> Answer:
        if model.engine != self._life():
            raise InternalError(
                "The engine was started again, and what this model had learnt since it was saved last is "
                "lost: load a saved state into it, or make a model from one.",
                code="model_lost",
            )
        result = await self._engine.call_model(model.id, call)
        if isinstance(call, Pass):
            model.trained_tokens += call.trained_tokens if call.backward else 0
            return pass_answer(result)
        if isinstance(call, Update):
            self._metrics.finetune_step(model.trained_tokens, 0)
            model.trained_tokens = 0
        return plain(type="optim_step", metrics=result.metrics)

    def run_pass(self, model: TrainedModel, call: Pass) -> Work:
        """What scores data, and adds gradients where it is to."""
        return lambda: self._call(model, call)

    def update(self, model: TrainedModel, call: Update) -> Work:
        """What takes an optimizer step."""
        return lambda: self._call(model, call)

    def load(self, model: TrainedModel, saved: Saved, optimizer: bool) -> Work:
        """What sets the weights; it brings a model back that the engine has lost. InvalidRequest for another
        shape's."""
        if self._runs.run_of(saved).lora != model.run.lora:
            raise InvalidRequest(
                "These weights have another rank, or sit on other modules, than the model.", param="path"
            )

        async def work() -> Answer:
            if model.engine != self._life():
                await self._open(model)
            await self._call(model, Load(directory=saved.folder, optimizer=optimizer))
            return plain(type="load_weights", path=saved.path, model_id=model.id)

        return work

    def save(
        self,
        model: TrainedModel,
        name: str,
        *,
        ttl: int | None,
        overwrite: bool,
        user_metadata: dict[str, str] | None,
        kind: str = WEIGHTS,
    ) -> Work:
        """What makes the weights durable under a name: with the optimizer's state, or for samplers only."""

        async def work() -> Answer:
            if not overwrite:
                self._runs.check_free(model.id, kind, name)
            folder = self._runs.new_folder()
            await self._call(model, Save(directory=str(folder), optimizer=kind == WEIGHTS))
            saved = await self._runs.add(model.id, kind, name, folder, ttl=ttl, user_metadata=user_metadata)
            answer = "save_weights" if kind == WEIGHTS else "save_weights_for_sampler"
            return plain(type=answer, path=saved.path)

        return work

    def snapshot(self, model: TrainedModel, name: str, begin_sampling: Callable[[Saved], str]) -> Work:
        """What makes a sampler of the weights as they are now, which goes with its session."""

        async def work() -> Answer:
            folder = self._runs.new_folder()
            await self._call(model, Save(directory=str(folder), optimizer=False))
            saved = await self._runs.add(model.id, SAMPLER, name, folder, ephemeral=True)
            model.ephemeral.append(saved)
            while len(model.ephemeral) > MAX_EPHEMERAL:
                await self._runs.delete(model.ephemeral.pop(0))
            sampler_id = begin_sampling(saved)
            return plain(type="save_weights_for_sampler", sampling_session_id=sampler_id)

        return work
