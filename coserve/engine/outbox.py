"""What the engine says: replies, refusals, and its jobs' news, as messages for the server."""

from __future__ import annotations

from collections.abc import Callable

from coserve.engine import messages as m
from coserve.errors import CoserveError
from coserve.training.job import StepMetrics
from coserve.training.model_calls import CallResult


class Outbox:
    """Turns outcomes into messages; also the `JobListener` and `CallListener` of the job manager."""

    def __init__(self, send: Callable[[m.Message], None]) -> None:
        self.send = send

    def answer(self, call_id: int, action: Callable[[], None]) -> None:
        """Run `action` and tell the caller how it went."""
        try:
            action()
        except CoserveError as error:
            self.reply(call_id, error)
        else:
            self.reply(call_id, None)

    def failing(self, call_id: int, action: Callable[[], None]) -> None:
        """Run `action`, which will answer by itself, and tell the caller if it can't."""
        try:
            action()
        except CoserveError as error:
            self.reply(call_id, error)

    def reply(self, call_id: int, error: CoserveError | None) -> None:
        """The outcome of a call."""
        self.send(m.Reply(call_id=call_id, error=None if error is None else m.Fault.of(error)))

    def result(self, call_id: int, result: CallResult) -> None:
        """What came of a call to a model."""
        self.send(m.ModelResult(call_id=call_id, result=result))

    def refuse(self, request_id: str, error: CoserveError) -> None:
        """A request that can't be served."""
        output = m.RequestOutput(request_id=request_id, finish_reason="error", error=m.Fault.of(error))
        self.send(m.StepOutputs(outputs=[output]))

    # ------------------------------------------------------------------ JobListener

    def progress(self, job_id: str, metrics: StepMetrics) -> None:
        """An optimizer step was committed."""
        self.send(m.JobProgress(job_id=job_id, metrics=metrics))

    def checkpoint(self, job_id: str, step: int, path: str, train_loss: float, kept: list[int]) -> None:
        """A checkpoint is on disk."""
        self.send(m.JobCheckpoint(job_id=job_id, step=step, path=path, train_loss=train_loss, kept=kept))

    def message(self, job_id: str, level: str, text: str) -> None:
        """Something to know about a job."""
        self.send(m.JobMessage(job_id=job_id, level=level, text=text))

    def waits(self, job_id: str, reason: str) -> None:
        """A job can't start yet."""
        self.send(m.JobStatus(job_id=job_id, status="queued", message=reason))

    def status(
        self, job_id: str, status: str, error: CoserveError | None = None, result_path: str = ""
    ) -> None:
        """A job changed its state."""
        if error is None:
            self.send(m.JobStatus(job_id=job_id, status=status, result_path=result_path))
        else:
            self.send(
                m.JobStatus(
                    job_id=job_id,
                    status=status,
                    message=error.message,
                    error_code=error.code,
                    error_param=error.param,
                )
            )
