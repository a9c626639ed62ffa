"""The flags of `coserve finetune`: type, limits and help of each, and the field of the request it sets.

Defaults in brackets are the server's: a flag that isn't given stays absent from the request.
"""

from __future__ import annotations

from typing import Annotated

import typer

# Flag -> field of `LoraConfig`, of `TrainingConfig`, of `CreateJobRequest`.
LORA_FIELDS = {
    "rank": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "use_rslora": "use_rslora",
    "init_lora_weights": "init_lora_weights",
    "freeze_a": "freeze_a",
}
MODULE_FIELDS = ("target_modules", "exclude_modules")
TRAINING_FIELDS = {
    "epochs": "n_epochs",
    "max_steps": "max_steps",
    "batch_size": "batch_size",
    "packing": "packing",
    "max_length": "max_length",
    "learning_rate": "learning_rate",
    "lr_scheduler_type": "lr_scheduler_type",
    "warmup_steps": "warmup_steps",
    "warmup_ratio": "warmup_ratio",
    "optimizer": "optimizer",
    "momentum": "momentum",
    "loraplus_lr_ratio": "loraplus_lr_ratio",
    "weight_decay": "weight_decay",
    "max_grad_norm": "max_grad_norm",
    "checkpoint_steps": "checkpoint_steps",
    "beta": "beta",
    "label_smoothing": "label_smoothing",
    "kl_coef": "kl_coef",
    "validation_split": "validation_split",
    "eval_steps": "eval_steps",
    "early_stopping_patience": "early_stopping_patience",
    "early_stopping_threshold": "early_stopping_threshold",
}
JOB_FIELDS = ("model", "adapter", "method", "init_from", "priority")
# What `--auto` leaves to the server -> the flags that settle it all the same.
AUTO = {
    "n_epochs": ("epochs",),
    "batch_size": ("batch_size",),
    "learning_rate_multiplier": ("learning_rate",),
}

Data = Annotated[str, typer.Argument(metavar="DATA", help="Training data, one JSON object a line.")]
Adapter = Annotated[str, typer.Option(metavar="NAME", help="Name to publish the adapter under.")]
Model = Annotated[str, typer.Option(help="Base model; the served one by default.")]
Method = Annotated[str, typer.Option(metavar="supervised|dft|dpo", help="What is learned from the data.")]
Rank = Annotated[int | None, typer.Option(min=1, help="LoRA rank [16].")]
LoraAlpha = Annotated[float | None, typer.Option(help="LoRA alpha [2 x rank].")]
LoraDropout = Annotated[float | None, typer.Option(min=0, max=1, help="Dropout before A [0].")]
TargetModules = Annotated[
    str, typer.Option(metavar="A,B,...", help="Modules to adapt [all linear layers of the blocks].")
]
ExcludeModules = Annotated[str, typer.Option(metavar="A,B,...", help="Modules left out of those.")]
UseRslora = Annotated[bool | None, typer.Option("--use-rslora", help="Scale by alpha / sqrt(rank).")]
InitLoraWeights = Annotated[str | None, typer.Option(metavar="true|gaussian", help="How A begins [true].")]
FreezeA = Annotated[bool | None, typer.Option("--freeze-a", help="Train B alone.")]
Epochs = Annotated[int | None, typer.Option(min=1, help="Passes over the data [3].")]
MaxSteps = Annotated[int | None, typer.Option(min=1, help="End after this many steps.")]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Examples of one optimizer step [8].")]
Packing = Annotated[
    bool | None, typer.Option("--packing", help="Fill packs of --max-length tokens; a batch counts packs.")
]
MaxLength = Annotated[int | None, typer.Option(min=0, help="Cut longer examples; 0 is the model's.")]
LearningRate = Annotated[float | None, typer.Option(min=0, help="Peak learning rate [2e-4].")]
LrSchedulerType = Annotated[str | None, typer.Option(help="As in transformers [linear].")]
WarmupSteps = Annotated[int | None, typer.Option(min=0, help="Warm-up steps, in place of the share.")]
WarmupRatio = Annotated[float | None, typer.Option(min=0, max=1, help="Share of warm-up steps [0.03].")]
Optimizer = Annotated[str | None, typer.Option(metavar="adamw|adamw_8bit|sgd", help="[adamw]")]
Momentum = Annotated[float | None, typer.Option(min=0, help="SGD's momentum [0.9].")]
LoraplusLrRatio = Annotated[
    float | None, typer.Option(min=0, help="Learning rate of B over that of A (LoRA+) [1].")
]
WeightDecay = Annotated[float | None, typer.Option(min=0, help="Decoupled weight decay [0].")]
MaxGradNorm = Annotated[float | None, typer.Option(min=0, help="Clip gradients here; 0 is off [1].")]
CheckpointSteps = Annotated[int | None, typer.Option(min=0, help="Steps between checkpoints.")]
Beta = Annotated[float | None, typer.Option(min=0, help="DPO's beta [0.1].")]
LabelSmoothing = Annotated[
    float | None, typer.Option(min=0, max=1, help="Share of the target spread over all tokens [0].")
]
KlCoef = Annotated[
    float | None, typer.Option(min=0, help="Weight of the divergence from where training started [0].")
]
ValidationData = Annotated[
    str, typer.Option(metavar="FILE", help="Score the adapter on this while it trains.")
]
ValidationSplit = Annotated[
    float | None, typer.Option(min=0, max=1, help="Hold this share of DATA out to score it on.")
]
EvalSteps = Annotated[int | None, typer.Option(min=0, help="Steps between two scores [an epoch].")]
EarlyStoppingPatience = Annotated[
    int | None, typer.Option(min=0, help="End after so many scores without a better one; 0 is never [0].")
]
EarlyStoppingThreshold = Annotated[
    float | None, typer.Option(min=0, help="By how much a score must be better [0].")
]
PublishIfValidLoss = Annotated[
    float | None, typer.Option(min=0, help="Publish only if the last score's loss is at most this.")
]
PublishIfCheck = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=FILE", help="Publish only if FILE's questions are answered; repeatable."),
]
PublishIfScore = Annotated[
    float | None, typer.Option(min=0, max=1, help="Share of right answers that every check wants [1].")
]
Auto = Annotated[
    bool,
    typer.Option(
        "--auto", help="Let the amount of data choose epochs, batch size and learning rate, unless given."
    ),
]
Seed = Annotated[int | None, typer.Option(min=0, help="Drawn by the server when not given.")]
InitFrom = Annotated[str, typer.Option(metavar="NAME", help="Start from an adapter or checkpoint.")]
Priority = Annotated[int, typer.Option(help="Lower goes first.")]
Tag = Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="Metadata; repeatable.")]
Preview = Annotated[
    bool, typer.Option("--preview", help="Only show which tokens would be trained on (asks the server).")
]
Limit = Annotated[
    int, typer.Option(min=1, max=1000, metavar="N", help="Lines of DATA that --preview shows.")
]
Follow = Annotated[bool, typer.Option(help="Stay until the job ends.")]
