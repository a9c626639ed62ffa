"""Backward calls of a step: beside its forward, after its answers, and those that rest until the next one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from coserve.core.calls_beside import CallBeside, calls_beside
from coserve.core.latency_model import LatencyModel
from coserve.core.step_plan import StepPlan
from coserve.core.training_queue import TrainingQueue
from coserve.core.training_sequence import RestingCall, TrainingSequence
from coserve.training.trainer import Trainer
from coserve.training.unit_calls import Call, Stop, never
from coserve.worker.streams import Streams


class BackwardCalls:
    """Runs planned units of `jobs` (by id) as calls on the `streams`, and accounts for them.

    `charge(job_id, seconds)` is told what each took, `fail(job_id, error)` what went wrong in one. `seconds`
    of the step went into them, `tokens` have been through their last.
    """

    def __init__(
        self,
        jobs: Mapping[str, Trainer],
        queue: TrainingQueue,
        model: LatencyModel,
        streams: Streams,
        charge: Callable[[str, float], None],
        fail: Callable[[str, Exception], None],
    ) -> None:
        self.streams = streams
        self.seconds = 0.0
        self.tokens = 0
        self._jobs, self._queue, self._model = jobs, queue, model
        self._charge, self._fail = charge, fail
        self._beside: list[tuple[CallBeside, Call]] = []

    def begin_beside(self, plan: StepPlan) -> None:
        """Once a forward with requests is launched: launch planned backward calls to run beside it, where the
        device can."""
        if not (self.streams.overlaps and plan.training_backward):
            return
        calls = calls_beside(plan, self._queue, self._model)
        if calls:
            with self.streams.beside():
                for call in calls:
                    self._beside.append((call, self._run(call.sequence, call.length)))
                    if self._beside[-1][1].error is not None:
                        break

    def end_beside(self) -> tuple[int, float]:
        """After the forward's answers: wait for the calls that ran beside it, and account for them; how many
        units they had, and the seconds that these should take by themselves."""
        if not self._beside:
            return 0, 0.0
        began, beside, units, seconds = time.perf_counter(), self._beside, 0, 0.0
        self._beside = []
        self.streams.join()
        self.seconds += time.perf_counter() - began
        for planned, call in beside:
            if call.error is not None:
                self._fail(call.sequence.job_id, call.error)
                break
            self._charge(call.sequence.job_id, planned.seconds)
            self._pay(call)
            units += call.length
            seconds += planned.seconds
        return units, seconds

    def finish_layer(self, sequence: TrainingSequence) -> None:
        """A layer's call that rests goes on to its end before what it reads is somebody else's."""
        if sequence.resting is not None and sequence.units[sequence.unit_cursor].kind == "layer":
            began = time.perf_counter()
            self._finish(self._launch(sequence, sequence.resting.length))
            self.seconds += time.perf_counter() - began

    def run_planned(
        self, plan: StepPlan, deadline: float, arrivals: Callable[[], bool] | None, ran: int = 0
    ) -> None:
        """Run the planned backward units but for the `ran` first, neighbours as one call, as far as they end
        before `deadline` (time.perf_counter()) by their prediction; the step's first only has to begin before
        it. With `arrivals` until a message waits. A call rests between pieces where it has to (`Stop`)."""
        began, is_first = time.perf_counter(), ran == 0
        for span in plan.training_backward:
            sequence, beside = span.sequence, min(ran, span.length)
            ran -= beside
            left = span.length - beside
            if sequence.unit_cursor != span.start + beside:
                continue  # finished meanwhile
            while left and sequence.job_id in self._jobs:
                now, index = time.perf_counter(), sequence.unit_cursor
                seconds = deadline - now if plan.inference else None
                length = self._queue.call_length(sequence, index, left, seconds)
                ends = now + (0.0 if is_first else self._queue.call_seconds(sequence, index, length))
                if ends >= deadline or (arrivals is not None and arrivals()):
                    self.seconds += now - began
                    return
                call = self._launch(sequence, length, (deadline, arrivals))
                self._finish(call)
                if not call.done:
                    self.seconds += time.perf_counter() - began
                    return
                left -= call.length
                is_first = False
        self.seconds += time.perf_counter() - began

    def _launch(
        self,
        sequence: TrainingSequence,
        length: int,
        until: tuple[float, Callable[[], bool] | None] | None = None,
    ) -> Call:
        """Run the sequence's next units as one call on the units' stream, for `_finish`. With `until` it may
        rest, unless the device runs it while others go on anyway."""
        stop = None
        if until is not None and not self.streams.overlaps:
            stop = Stop(*until, sequence.resting.piece if sequence.resting is not None else 0.0)
        with self.streams.beside():
            return self._run(sequence, length, stop)

    def _run(self, sequence: TrainingSequence, length: int, stop: Stop | None = None) -> Call:
        try:
            done = self._jobs[sequence.job_id].run_units(sequence, length, stop or never)
        except Exception as error:
            return Call(sequence, length, error=error)
        return Call(sequence, length, done, 0.0 if stop is None else stop.longest)

    def _finish(self, call: Call) -> None:
        """Wait for the call launched last, and account for it."""
        seconds, sequence = self.streams.join(), call.sequence
        if call.error is not None:
            self._fail(sequence.job_id, call.error)
            return
        self._charge(sequence.job_id, seconds)
        whole = seconds + (sequence.resting.seconds if sequence.resting is not None else 0.0)
        if not call.done:
            sequence.resting = RestingCall(call.length, whole, call.piece)
            return
        index = sequence.unit_cursor
        kind, tokens = sequence.unit_kind(index), sequence.tokens_of(index, call.length)
        self._model.observe_unit(kind, tokens, whole)
        self._pay(call)

    def _pay(self, call: Call) -> None:
        """The call's units have run."""
        sequence = call.sequence
        sequence.pay_units(call.length)
        if sequence.done:
            self.tokens += sequence.num_tokens if sequence.trains else 0
            self._queue.release(sequence)
            if sequence.trains and self._queue.keeps_gradients(sequence.job_id):
                self._jobs[sequence.job_id].keep_gradients()
