"""`coserve jobs`: list, look at, watch and steer fine-tuning jobs over gRPC."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

import typer

from coserve.cli.connection import DEFAULT_GRPC, ApiKey, CaCert, ClientCert, Grpc, channel, metadata
from coserve.cli.failure import CommandFailed
from coserve.cli.values import pairs

app = typer.Typer(help="List, follow and steer fine-tuning jobs.", no_args_is_help=False)
JobId = Annotated[str, typer.Argument(metavar="JOB", help="The job's id (ftjob-...).")]
_DETAILS = (
    "id", "status", "status_reason", "method", "model", "adapter", "fine_tuned_model", "init_from",
    "training_file", "validation_file", "step", "total_steps", "epoch", "loss", "valid_loss",
    "tokens_per_second", "share", "trained_tokens", "seed", "priority",
)  # fmt: skip
_TIMES = ("created_at", "started_at", "estimated_finish", "finished_at")


@app.command("list")
def list_jobs(
    limit: Annotated[int, typer.Option(min=1, help="Show at most so many.")] = 20,
    tag: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Only jobs with this metadata; repeatable.")
    ] = None,
    grpc_address: Grpc = DEFAULT_GRPC,
    api_key: ApiKey = "",
    ca_cert: CaCert = "",
    client_cert: ClientCert = "",
) -> None:
    """Jobs, the newest first."""
    wanted = dict(pairs(tag or (), "--tag"))
    from coserve.cli.stubs import fine_tuning

    with channel(grpc_address, ca_cert, client_cert) as opened:
        pb, stub = fine_tuning(opened)
        answer = stub.ListJobs(pb.ListJobsRequest(limit=limit, metadata=wanted), metadata=metadata(api_key))
    rows = [
        (job.id, job.status, job.adapter, _steps(job), _loss(job, "loss"), _loss(job, "valid_loss"),
         job.method, _time(job.created_at))
        for job in answer.jobs
    ]  # fmt: skip
    print_table(("JOB", "STATUS", "ADAPTER", "STEP", "LOSS", "VALID", "METHOD", "CREATED"), rows)


@app.command("get")
def get(
    job: JobId,
    grpc_address: Grpc = DEFAULT_GRPC,
    api_key: ApiKey = "",
    ca_cert: CaCert = "",
    client_cert: ClientCert = "",
) -> None:
    """One job with its settings."""
    from coserve.cli.stubs import fine_tuning

    with channel(grpc_address, ca_cert, client_cert) as opened:
        pb, stub = fine_tuning(opened)
        found = stub.GetJob(pb.GetJobRequest(job_id=job), metadata=metadata(api_key))
    for name in _DETAILS:
        print(f"{name:17} {_shown(found, name)}")
    for name in _TIMES:
        print(f"{name:17} {_time(getattr(found, name))}")
    for name in ("lora", "training"):
        for field, value in getattr(found, name).ListFields():
            print(f"{name:17} {field.name}: {_plain(value)}")
    for key, value in sorted(found.metadata.items()):
        print(f"{'metadata':17} {key}: {value}")
    if found.error.message:
        print(f"{'error':17} {found.error.message}")


@app.command("checkpoints")
def checkpoints(
    job: JobId,
    grpc_address: Grpc = DEFAULT_GRPC,
    api_key: ApiKey = "",
    ca_cert: CaCert = "",
    client_cert: ClientCert = "",
) -> None:
    """The checkpoints of a job that are kept, the newest first."""
    from coserve.cli.stubs import fine_tuning

    with channel(grpc_address, ca_cert, client_cert) as opened:
        pb, stub = fine_tuning(opened)
        answer = stub.ListCheckpoints(pb.ListCheckpointsRequest(job_id=job), metadata=metadata(api_key))
    rows = [
        (row.id, str(row.step), f"{row.train_loss:.4f}", _loss(row, "valid_loss"), _time(row.created_at))
        for row in answer.checkpoints
    ]
    print_table(("CHECKPOINT", "STEP", "LOSS", "VALID", "CREATED"), rows)


@app.command("watch")
def watch(
    job: JobId,
    grpc_address: Grpc = DEFAULT_GRPC,
    api_key: ApiKey = "",
    ca_cert: CaCert = "",
    client_cert: ClientCert = "",
) -> None:
    """Follow a job from its first step to its end; the exit code is its verdict."""
    from coserve.cli.stubs import fine_tuning

    with channel(grpc_address, ca_cert, client_cert) as opened:
        pb, stub = fine_tuning(opened)
        follow_job(pb, stub, job, api_key)


@app.command("cancel")
def cancel(
    job: JobId,
    grpc_address: Grpc = DEFAULT_GRPC,
    api_key: ApiKey = "",
    ca_cert: CaCert = "",
    client_cert: ClientCert = "",
) -> None:
    """End a job; it publishes nothing."""
    _control("CancelJob", job, grpc_address, api_key, ca_cert, client_cert)


@app.command("pause")
def pause(
    job: JobId,
    grpc_address: Grpc = DEFAULT_GRPC,
    api_key: ApiKey = "",
    ca_cert: CaCert = "",
    client_cert: ClientCert = "",
) -> None:
    """Stop a job after the step it is in, to be resumed."""
    _control("PauseJob", job, grpc_address, api_key, ca_cert, client_cert)


@app.command("resume")
def resume(
    job: JobId,
    grpc_address: Grpc = DEFAULT_GRPC,
    api_key: ApiKey = "",
    ca_cert: CaCert = "",
    client_cert: ClientCert = "",
) -> None:
    """Let a paused job go on."""
    _control("ResumeJob", job, grpc_address, api_key, ca_cert, client_cert)


def follow_job(pb: Any, stub: Any, job_id: str, api_key: str) -> None:
    """Show the job's events to its end; raises CommandFailed unless it succeeds."""
    from rich.console import Console

    from coserve.cli.progress import JobView, events, going_on

    console = Console()
    hint = f"the job goes on; follow it with: coserve jobs watch {job_id}"
    status, message = "", ""
    with going_on(hint, console), JobView(job_id, console) as view:
        for event in events(stub, pb.WatchJobRequest, job_id, metadata(api_key)):
            view.show(event)
            if event.type == "status":
                status, message = event.status, event.message
    if status != "succeeded":
        raise CommandFailed(f"job {job_id} {status or 'has not ended'}" + (f": {message}" if message else ""))
    job = stub.GetJob(pb.GetJobRequest(job_id=job_id), metadata=metadata(api_key))
    console.print(
        f"use it as model={job.fine_tuned_model} (coserve chat --model {job.fine_tuned_model})",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip


def print_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Left-aligned columns in plain text, the same on a terminal and in a pipe."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    for row in [header, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def _control(call: str, job_id: str, address: str, api_key: str, ca_cert: str, client_cert: str) -> None:
    from coserve.cli.stubs import fine_tuning

    with channel(address, ca_cert, client_cert) as opened:
        pb, stub = fine_tuning(opened)
        answer = getattr(stub, call)(getattr(pb, f"{call}Request")(job_id=job_id), metadata=metadata(api_key))
    print(f"{answer.id} {answer.status}")


def _steps(job: Any) -> str:
    return f"{job.step}/{job.total_steps}" if job.total_steps else "-"


def _loss(job: Any, name: str) -> str:
    return f"{getattr(job, name):.4f}" if job.HasField(name) else "-"


def _shown(job: Any, name: str) -> Any:
    """A detail's value, `-` for what isn't known; numbers as people read them."""
    value = getattr(job, name)
    if name in ("loss", "valid_loss"):
        return _loss(job, name)
    return f"{value:.3g}" if isinstance(value, float) else "-" if value == "" else value


def _plain(value: Any) -> str:
    """A setting on one line."""
    if isinstance(value, str | bool | int | float):
        return f"{value:g}" if isinstance(value, float) else str(value)
    items = getattr(value, "items", None)
    return ", ".join(f"{k}={v}" for k, v in items()) if items else ", ".join(map(str, value))


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).isoformat(" ", "seconds") if seconds else "-"
