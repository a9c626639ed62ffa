"""`coserve finetune DATA --adapter NAME`: upload, submit, follow; the exit code is the job's verdict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from coserve.cli import finetune_flags as flags
from coserve.cli.connection import DEFAULT_GRPC, ApiKey, CaCert, ClientCert, Grpc, channel, chunks, metadata
from coserve.cli.jobs import follow_job
from coserve.cli.preview import preview_file
from coserve.cli.values import existing_file, pairs
from coserve.errors import ConfigError


def finetune(
    data: flags.Data,
    adapter: flags.Adapter = "",
    model: flags.Model = "",
    method: flags.Method = "supervised",
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
    beta: flags.Beta = None,
    label_smoothing: flags.LabelSmoothing = None,
    kl_coef: flags.KlCoef = None,
    validation_data: flags.ValidationData = "",
    validation_split: flags.ValidationSplit = None,
    eval_steps: flags.EvalSteps = None,
    early_stopping_patience: flags.EarlyStoppingPatience = None,
    early_stopping_threshold: flags.EarlyStoppingThreshold = None,
    publish_if_valid_loss: flags.PublishIfValidLoss = None,
    publish_if_check: flags.PublishIfCheck = None,
    publish_if_score: flags.PublishIfScore = None,
    auto: flags.Auto = False,
    seed: flags.Seed = None,
    init_from: flags.InitFrom = "",
    priority: flags.Priority = 0,
    tag: flags.Tag = None,
    preview: flags.Preview = False,
    limit: flags.Limit = 3,
    follow: flags.Follow = True,
    grpc_address: Grpc = DEFAULT_GRPC,
    api_key: ApiKey = "",
    ca_cert: CaCert = "",
    client_cert: ClientCert = "",
) -> None:
    """Fine-tune an adapter on a running server, beside whatever it serves."""
    _run(dict(locals()))


def _run(given: Mapping[str, Any]) -> None:
    if not given["adapter"] and not given["preview"]:
        raise ConfigError(
            "--adapter NAME is missing: the name to publish the adapter under.", param="--adapter"
        )
    path = existing_file(given["data"], "DATA")
    scored = given["validation_data"]
    validation = existing_file(scored, "--validation-data") if scored else None
    checks = {
        name: existing_file(file, "--publish-if-check")
        for name, file in pairs(given["publish_if_check"] or (), "--publish-if-check")
    }
    if given["publish_if_score"] is not None and not checks:
        raise ConfigError("--publish-if-score needs a --publish-if-check.", param="--publish-if-score")
    lora, training, rest = settings(given)
    if given["preview"]:
        preview_file(given, path, training)
        return
    api_key = given["api_key"]
    from coserve.cli.stubs import fine_tuning

    with channel(given["grpc_address"], given["ca_cert"], given["client_cert"]) as opened:
        pb, stub = fine_tuning(opened)
        config = pb.TrainingConfig(**training)

        def send(path: Path) -> Any:
            return stub.UploadFile(upload(pb.UploadFileRequest, path), metadata=metadata(api_key))

        file = send(path)
        if validation is not None:
            rest["validation_file"] = send(validation).id
        if checks or given["publish_if_valid_loss"] is not None:
            asked = [
                pb.PublishCheck(name=name, file=send(source).id, min_score=given["publish_if_score"])
                for name, source in checks.items()
            ]
            loss = given["publish_if_valid_loss"]
            rest["publish_if"] = pb.PublishGate(max_valid_loss=loss, checks=asked)
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
