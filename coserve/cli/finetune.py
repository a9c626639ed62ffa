"""`coserve finetune DATA --adapter NAME`: upload, submit, follow; the exit code is the job's verdict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from coserve.cli.connection import DEFAULT_GRPC, ApiKey, CaCert, Grpc, channel, chunks, metadata
from coserve.cli.jobs import follow_job
from coserve.cli.values import existing_file, pairs

PREVIEW_ROWS = 3
PREVIEW_LINES = 100  # of the file; enough to show, and small enough for one message
# Flag of this command -> field of `LoraConfig` and of `TrainingConfig`. A flag not given stays absent.
_LORA_FIELDS = {"rank": "r", "lora_alpha": "lora_alpha"}
_TRAINING_FIELDS = {
    "epochs": "n_epochs",
    "max_steps": "max_steps",
    "batch_size": "batch_size",
    "learning_rate": "learning_rate",
    "lr_scheduler_type": "lr_scheduler_type",
    "warmup_ratio": "warmup_ratio",
    "weight_decay": "weight_decay",
    "max_grad_norm": "max_grad_norm",
    "max_length": "max_length",
    "checkpoint_steps": "checkpoint_steps",
}


def finetune(
    data: Annotated[str, typer.Argument(metavar="DATA", help="Chat examples, one JSON object a line.")],
    adapter: Annotated[str, typer.Option(metavar="NAME", help="Name to publish the adapter under.")],
    model: Annotated[str, typer.Option(help="Base model; the served one by default.")] = "",
    rank: Annotated[int | None, typer.Option(min=1, help="LoRA rank [16].")] = None,
    lora_alpha: Annotated[float | None, typer.Option(help="LoRA alpha [2 x rank].")] = None,
    target_modules: Annotated[
        str, typer.Option(metavar="A,B,...", help="Modules to adapt [all linear layers of the blocks].")
    ] = "",
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the data [3].")] = None,
    max_steps: Annotated[int | None, typer.Option(min=1, help="End after this many steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Examples of one optimizer step [8].")] = None,
    learning_rate: Annotated[float | None, typer.Option(min=0, help="Peak learning rate [2e-4].")] = None,
    lr_scheduler_type: Annotated[str | None, typer.Option(help="As in transformers [linear].")] = None,
    warmup_ratio: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of warm-up steps [0.03].")
    ] = None,
    weight_decay: Annotated[float | None, typer.Option(min=0, help="AdamW's decay [0].")] = None,
    max_grad_norm: Annotated[
        float | None, typer.Option(min=0, help="Clip gradients here; 0 is off [1].")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=0, help="Cut longer examples; 0 is the model's.")
    ] = None,
    checkpoint_steps: Annotated[int | None, typer.Option(min=0, help="Steps between checkpoints.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Drawn by the server when not given.")] = None,
    init_from: Annotated[str, typer.Option(metavar="NAME", help="Start from an adapter or checkpoint.")] = "",
    priority: Annotated[int, typer.Option(help="Lower goes first.")] = 0,
    tag: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="Metadata; repeatable.")] = None,
    preview: Annotated[bool, typer.Option("--preview", help="Only show what would be trained on.")] = False,
    follow: Annotated[bool, typer.Option(help="Stay until the job ends.")] = True,
    grpc_address: Grpc = DEFAULT_GRPC,
    api_key: ApiKey = "",
    ca_cert: CaCert = "",
) -> None:
    """Fine-tune an adapter on a running server, beside whatever it serves."""
    given = dict(locals())
    path = existing_file(data, "DATA")
    lora, training, rest = settings(given)
    from coserve.cli.stubs import fine_tuning

    with channel(grpc_address, ca_cert) as opened:
        pb, stub = fine_tuning(opened)
        config = pb.TrainingConfig(**training)
        if preview:
            request = pb.PreviewDatasetRequest(
                data=first_lines(path), model=model, training=config, limit=PREVIEW_ROWS
            )
            _print_preview(stub.PreviewDataset(request, metadata=metadata(api_key)))
            return
        file = stub.UploadFile(upload(pb.UploadFileRequest, path), metadata=metadata(api_key))
        job = stub.CreateJob(
            pb.CreateJobRequest(training_file=file.id, lora=pb.LoraConfig(**lora), training=config, **rest),
            metadata=metadata(api_key),
        )
        print(f"job {job.id}: {path.name}, {file.bytes} bytes", flush=True)
        if follow:
            follow_job(pb, stub, job.id, api_key)


def settings(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The flags as fields of `LoraConfig`, of `TrainingConfig` and of `CreateJobRequest` itself."""
    lora = {field: given[flag] for flag, field in _LORA_FIELDS.items() if given[flag] is not None}
    modules = [name.strip() for name in given["target_modules"].split(",") if name.strip()]
    if modules:
        lora["target_modules"] = modules
    training = {field: given[flag] for flag, field in _TRAINING_FIELDS.items() if given[flag] is not None}
    rest = {name: given[name] for name in ("model", "adapter", "init_from", "priority")}
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
