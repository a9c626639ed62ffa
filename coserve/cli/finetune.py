"""`coserve finetune DATA --adapter NAME`: upload, submit, follow; the exit code is the job's verdict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from coserve.cli import finetune_flags as flags
from coserve.cli.connection import DEFAULT_GRPC, ApiKey, CaCert, Grpc, channel, chunks, metadata
from coserve.cli.jobs import follow_job
from coserve.cli.values import existing_file, pairs

PREVIEW_ROWS = 3
PREVIEW_LINES = 100  # of the file; enough to show, and small enough for one message


def finetune(
    data: flags.Data,
    adapter: flags.Adapter,
    model: flags.Model = "",
    rank: flags.Rank = None,
    lora_alpha: flags.LoraAlpha = None,
    lora_dropout: flags.LoraDropout = None,
    target_modules: flags.TargetModules = "",
    exclude_modules: flags.ExcludeModules = "",
    use_rslora: flags.UseRslora = None,
    init_lora_weights: flags.InitLoraWeights = None,
    freeze_a: flags.FreezeA = None,
    epochs: flags.Epochs = None,
    max_steps: flags.MaxSteps = None,
    batch_size: flags.BatchSize = None,
    packing: flags.Packing = None,
    max_length: flags.MaxLength = None,
    learning_rate: flags.LearningRate = None,
    lr_scheduler_type: flags.LrSchedulerType = None,
    warmup_steps: flags.WarmupSteps = None,
    warmup_ratio: flags.WarmupRatio = None,
    optimizer: flags.Optimizer = None,
    momentum: flags.Momentum = None,
    loraplus_lr_ratio: flags.LoraplusLrRatio = None,
    weight_decay: flags.WeightDecay = None,
    max_grad_norm: flags.MaxGradNorm = None,
    checkpoint_steps: flags.CheckpointSteps = None,
    auto: flags.Auto = False,
    seed: flags.Seed = None,
    init_from: flags.InitFrom = "",
    priority: flags.Priority = 0,
    tag: flags.Tag = None,
    preview: flags.Preview = False,
    follow: flags.Follow = True,
    grpc_address: Grpc = DEFAULT_GRPC,
    api_key: ApiKey = "",
    ca_cert: CaCert = "",
) -> None:
    """Fine-tune an adapter on a running server, beside whatever it serves."""
    _run(dict(locals()))


def _run(given: Mapping[str, Any]) -> None:
    path = existing_file(given["data"], "DATA")
    lora, training, rest = settings(given)
    api_key = given["api_key"]
    from coserve.cli.stubs import fine_tuning

    with channel(given["grpc_address"], given["ca_cert"]) as opened:
        pb, stub = fine_tuning(opened)
        config = pb.TrainingConfig(**training)
        if given["preview"]:
            request = pb.PreviewDatasetRequest(
                data=first_lines(path), model=given["model"], training=config, limit=PREVIEW_ROWS
            )
            _print_preview(stub.PreviewDataset(request, metadata=metadata(api_key)))
            return
        file = stub.UploadFile(upload(pb.UploadFileRequest, path), metadata=metadata(api_key))
        job = stub.CreateJob(
            pb.CreateJobRequest(training_file=file.id, lora=pb.LoraConfig(**lora), training=config, **rest),
            metadata=metadata(api_key),
        )
        print(f"job {job.id}: {path.name}, {file.bytes} bytes", flush=True)
        if given["follow"]:
            follow_job(pb, stub, job.id, api_key)


def settings(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The flags as fields of `LoraConfig`, of `TrainingConfig` and of `CreateJobRequest` itself."""
    lora = {name: given[flag] for flag, name in flags.LORA_FIELDS.items() if given[flag] is not None}
    for flag in flags.MODULE_FIELDS:
        modules = [name.strip() for name in given[flag].split(",") if name.strip()]
        if modules:
            lora[flag] = modules
    training = {name: given[flag] for flag, name in flags.TRAINING_FIELDS.items() if given[flag] is not None}
    if given["auto"]:
        training["auto"] = [
            name for name, settled in flags.AUTO.items() if all(given[flag] is None for flag in settled)
        ]
    rest = {name: given[name] for name in flags.JOB_FIELDS}
    rest["metadata"] = dict(pairs(given["tag"] or (), "--tag"))
    if given["seed"] is not None:
        rest["seed"] = given["seed"]
    return lora, training, rest


def upload(request: Any, path: Path) -> Iterator[Any]:
    """The messages of `UploadFile`: what it is, alone; then its bytes."""
    yield request(info={"filename": path.name, "purpose": "fine-tune"})
    for piece in chunks(path):
        yield request(data=piece)


def first_lines(path: Path) -> bytes:
    """The file's first `PREVIEW_LINES` lines."""
    with path.open("rb") as file:
        return b"".join(islice(file, PREVIEW_LINES))


def _print_preview(answer: Any) -> None:
    for number, row in enumerate(answer.rows, 1):
        trained = sum(label != -100 for label in row.labels)
        print(f"--- example {number}: {len(row.token_ids)} tokens, {trained} of them trained on")
        print(row.text)
