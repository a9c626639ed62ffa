"""Between protobuf messages and the plain values of the application layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from google.protobuf.message import Message

from coserve.server.adapter_store import AdapterRow
from coserve.server.application.job_changes import checkpoint_names
from coserve.server.application.preview import Preview
from coserve.server.file_store import FileRow
from coserve.server.grpc_gen import adapters_pb2, fine_tuning_pb2
from coserve.server.job_store import Check, CheckpointRow, CheckResult, JobEvent, JobRecord, PublishGate
from coserve.training.job import LoraSpec, TrainingSpec


def plain(message: Message) -> dict[str, Any]:
    """A message as a dictionary of what was set: fields without presence count when they aren't empty."""
    found: dict[str, Any] = {}
    for field, value in message.ListFields():
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            found[field.name] = dict(value)
        elif field.message_type is not None and field.is_repeated:
            found[field.name] = [plain(item) for item in value]
        elif field.message_type is not None:
            found[field.name] = plain(value)
        else:
            found[field.name] = list(value) if field.is_repeated else value
    return found


def lora_message(lora: LoraSpec) -> fine_tuning_pb2.LoraConfig:
    """The shape in force."""
    return fine_tuning_pb2.LoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=lora.target_modules,
        exclude_modules=lora.exclude_modules,
        rank_pattern=lora.rank_pattern,
        alpha_pattern=lora.alpha_pattern,
        use_rslora=lora.use_rslora,
        init_lora_weights="true" if lora.init_lora_weights == "default" else lora.init_lora_weights,
        layers_to_transform=lora.layers_to_transform,
        peft_type="LORA",
        freeze_a=lora.freeze_a,
    )


def training_message(training: TrainingSpec, auto: Sequence[str] = ()) -> fine_tuning_pb2.TrainingConfig:
    """The settings in force; those that `auto` names are still to be chosen."""
    values = {name: getattr(training, name) for name in training.__struct_fields__}
    if "learning_rate_multiplier" in auto:
        del values["learning_rate"]
    found = {name: value for name, value in values.items() if value is not None and name not in auto}
    return fine_tuning_pb2.TrainingConfig(auto=auto, **found)


def job_message(job: JobRecord) -> fine_tuning_pb2.Job:
    """A job."""
    error = job.error
    return fine_tuning_pb2.Job(
        id=job.id,
        status=job.status,
        model=job.model,
        adapter=job.adapter,
        fine_tuned_model=job.fine_tuned_model or "",
        training_file=job.training_file,
        validation_file=job.validation_file,
        method=job.method,
        lora=lora_message(job.lora),
        training=training_message(job.training, job.auto),
        seed=job.seed,
        created_at=job.created_at,
        started_at=job.started_at or 0,
        finished_at=job.finished_at or 0,
        estimated_finish=job.estimated_finish or 0,
        trained_tokens=job.trained_tokens,
        step=job.step,
        total_steps=job.total_steps,
        error=fine_tuning_pb2.JobError(code=error.code, message=error.message, param=error.param or "")
        if error
        else None,
        result_files=job.result_files,
        metadata=job.metadata,
        suffix=job.suffix,
        init_from=job.init_from,
        priority=job.priority,
        epoch=job.epoch,
        tokens_per_second=job.tokens_per_second,
        share=job.share,
        loss=job.loss,
        valid_loss=job.valid_loss,
        status_reason=job.status_reason,
        publish_if=_gate(job.publish_if) if job.publish_if is not None else None,
        check_results=[fine_tuning_pb2.CheckResult(**_values(found)) for found in job.check_results],
    )


def _gate(gate: PublishGate) -> fine_tuning_pb2.PublishGate:
    checks = [fine_tuning_pb2.PublishCheck(**_values(check)) for check in gate.checks]
    return fine_tuning_pb2.PublishGate(
        max_valid_loss=gate.max_valid_loss, min_valid_accuracy=gate.min_valid_accuracy, checks=checks
    )


def _values(struct: Check | CheckResult) -> dict[str, Any]:
    return {name: getattr(struct, name) for name in struct.__struct_fields__}


def event_message(event: JobEvent) -> fine_tuning_pb2.JobEvent:
    """An event."""
    return fine_tuning_pb2.JobEvent(
        id=event.id,
        job_id=event.job_id,
        created_at=event.created_at,
        level=event.level,
        type=event.type,
        message=event.message,
        status=event.status,
        step=event.step,
        total_steps=event.total_steps,
        epoch=event.epoch,
        loss=event.loss,
        learning_rate=event.learning_rate,
        grad_norm=event.grad_norm,
        tokens_per_second=event.tokens_per_second,
        share=event.share,
        checkpoint=event.checkpoint,
        accuracy=event.accuracy,
        valid_loss=event.valid_loss,
        valid_accuracy=event.valid_accuracy,
        trained_tokens=event.trained_tokens,
        seconds=event.seconds,
    )


def checkpoint_message(
    job: JobRecord, checkpoint: CheckpointRow, step: JobEvent | None
) -> fine_tuning_pb2.Checkpoint:
    """A checkpoint; `step` is the metrics event of its optimizer step."""
    return fine_tuning_pb2.Checkpoint(
        id=checkpoint.id,
        job_id=checkpoint.job_id,
        step=checkpoint.step,
        train_loss=checkpoint.train_loss,
        created_at=checkpoint.created_at,
        name=checkpoint_names(job, checkpoint)[1],
        accuracy=step.accuracy if step else None,
        valid_loss=step.valid_loss if step else None,
        valid_accuracy=step.valid_accuracy if step else None,
    )


def file_message(file: FileRow) -> fine_tuning_pb2.File:
    """A file."""
    return fine_tuning_pb2.File(
        id=file.id, filename=file.filename, bytes=file.bytes, purpose=file.purpose, created_at=file.created_at
    )


def preview_message(found: Preview) -> fine_tuning_pb2.PreviewDatasetResponse:
    """A preview."""
    rows = [
        fine_tuning_pb2.PreviewRow(
            text=shown.example.text,
            token_ids=shown.example.token_ids,
            labels=shown.example.labels,
            line=shown.row.line,
            answer=shown.answer,
            spans=[fine_tuning_pb2.PreviewSpan(text=text, trained=trained) for text, trained in shown.spans],
            cut_tokens=shown.row.cut_tokens,
            dropped=shown.row.dropped,
        )
        for shown in found.shown
    ]
    counts = fine_tuning_pb2.PreviewCounts(**vars(found.counts))
    return fine_tuning_pb2.PreviewDatasetResponse(rows=rows, counts=counts, kind=found.kind)


def adapter_message(row: AdapterRow, tier: str) -> adapters_pb2.Adapter:
    """An adapter version."""
    version = row.version
    return adapters_pb2.Adapter(
        name=version.name,
        version=version.version,
        digest=version.digest,
        rank=version.rank,
        status=version.status,
        tier=tier,
        job_id=version.job_id,
        created_at=version.created_at,
        pinned=version.pinned,
    )
