"""The models that are trained by calls: which there are, which wait for their place, whose turn it is."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Protocol

from coserve.core.training_queue import TrainingQueue
from coserve.errors import CoserveError, FailedPrecondition, InternalError, InvalidRequest, NotFound
from coserve.lora.adapter_pool import AdapterPool
from coserve.models.decoder import Decoder
from coserve.training.called_model import CalledModel, Outcome
from coserve.training.job import JobSpec
from coserve.training.job_places import JobPlaces
from coserve.training.model_calls import CallResult, ModelCall
from coserve.training.unit_calls import Stop
from coserve.worker.kv_tensors import KVTensors

logger = logging.getLogger(__name__)

FILE_WAIT = 0.005  # seconds at a time for a file while nothing else runs


class CallListener(Protocol):
    """Hears what came of calls."""

    def result(self, call_id: int, result: CallResult) -> None:
        """A call is done."""

    def reply(self, call_id: int, error: CoserveError | None) -> None:
        """A model is there (None), or a call can't be done."""


class CalledModels:
    """Models by id. Everything happens between or inside steps, in the engine's one thread."""

    def __init__(
        self,
        decoder: Decoder,
        pool: AdapterPool,
        kv: KVTensors,
        places: JobPlaces,
        queue: TrainingQueue,
        writer: Executor,
        listener: CallListener,
    ) -> None:
        self.by_id: dict[str, CalledModel] = {}
        self._decoder, self._pool, self._kv = decoder, pool, kv
        self._places, self._queue, self._writer, self._listener = places, queue, writer, listener
        self._waiting: dict[str, tuple[JobSpec, int]] = {}  # with the call to be answered

    @property
    def has_files(self) -> bool:
        """A file is being read or written."""
        return any(model.reads_or_writes for model in self.by_id.values())

    def open(self, spec: JobSpec, call_id: int) -> None:
        """A new model, once there is a place for it. InvalidRequest where it can't be."""
        if spec.job_id in self.by_id or spec.job_id in self._waiting:
            raise InvalidRequest(f"the model {spec.job_id} is there already", param="model_id")
        self._waiting[spec.job_id] = spec, call_id
        self._open_waiting()

    def _open_waiting(self) -> None:
        for model_id, (spec, call_id) in list(self._waiting.items()):
            try:
                lack = self._places.take(spec)
                if lack is not None and lack.passes:
                    return
                if lack is not None:
                    raise FailedPrecondition(lack.reason, code="out_of_memory")
                self.by_id[model_id] = self._make(spec)
            except CoserveError as error:
                self._places.forget(model_id)
                self._listener.reply(call_id, error)
            else:
                self._listener.reply(call_id, None)
            del self._waiting[model_id]

    def _make(self, spec: JobSpec) -> CalledModel:
        rows, _ = self._places.rows(spec)
        try:
            return CalledModel(spec, self._decoder, self._pool, rows, self._kv, self._writer, self._say)
        except BaseException:
            self._places.free(spec)
            raise

    def _say(self, call_id: int, outcome: Outcome) -> None:
        if isinstance(outcome, CallResult):
            self._listener.result(call_id, outcome)
        else:
            self._listener.reply(call_id, outcome)

    def call(self, model_id: str, call_id: int, call: ModelCall) -> None:
        """Ask something of a model. Raises NotFound, and FailedPrecondition for what it can never do."""
        model = self.by_id.get(model_id)
        if model is None:
            raise NotFound(f"The engine has no model {model_id}.", param="model_id")
        model.add(call_id, call)
        self._go_on(model, Stop(0.0, None))

    def close(self, model_id: str) -> None:
        """Forget a model, with all that was asked of it. NotFound."""
        error = FailedPrecondition(f"The model {model_id} was unloaded.", param="model_id")
        if model_id in self._waiting:
            _, call_id = self._waiting.pop(model_id)
            self._places.forget(model_id)
            self._listener.reply(call_id, error)
            return
        model = self.by_id.pop(model_id, None)
        if model is None:
            raise NotFound(f"The engine has no model {model_id}.", param="model_id")
        self._queue.remove(model_id)
        model.close(error)
        self._places.free(model.spec)

    def fail(self, model_id: str, error: Exception) -> None:
        """What a model does now went wrong: its fault must not be everybody's."""
        if not isinstance(error, CoserveError):
            logger.error("model %s failed", model_id, exc_info=error)
            error = InternalError("The call failed in the engine; see the engine's log.")
        self._queue.remove(model_id)
        self.by_id[model_id].fail(error)

    def advance(
        self, deadline: float, arrivals: Callable[[], bool] | None, charge: Callable[[str, float], None]
    ) -> float:
        """After a step: what follows from what has run, updates as far as their pieces end before `deadline`,
        or with `arrivals` until a message waits. The seconds that were taken."""
        taken = 0.0
        for model in list(self.by_id.values()):
            if model.is_idle:
                continue
            began = time.perf_counter()
            if arrivals is None and began >= deadline:
                break
            if arrivals is not None and model.reads_or_writes and not self._queue.has_work:
                model.wait_for_file(FILE_WAIT)
                began = time.perf_counter()
            self._go_on(model, Stop(deadline, arrivals))
            seconds = time.perf_counter() - began
            charge(model.spec.job_id, seconds)
            taken += seconds
        if self._waiting:
            self._open_waiting()
        return taken

    def _go_on(self, model: CalledModel, stop: Stop) -> None:
        spec = model.spec
        try:
            begun = model.go_on(stop)
        except Exception as error:
            self.fail(spec.job_id, error)
            return
        if begun:
            self._queue.submit(spec.job_id, model.sequences, spec.priority, spec.tenant, spec.share)
        elif model.is_changing:
            self._queue.submit(spec.job_id, [], spec.priority, spec.tenant, spec.share)
        elif not model.sequences:
            self._queue.remove(spec.job_id)
        self._queue.owe_update(spec.job_id, model.is_changing)
