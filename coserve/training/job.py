"""What a fine-tuning job is: its settings and what one of its steps reports. Torch-free plain data.

The server validates and fills every default in, so the engine finds each value set. Names and defaults are
those of the gRPC contract (`LoraConfig`, `TrainingConfig`), which are PEFT's and transformers'.
"""

from __future__ import annotations

import msgspec


class LoraSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The adapter's shape, in PEFT's words. `lora_alpha` 0 stands for 2r; `target_modules` () for all
    linear layers of the blocks; both are resolved by the server before the engine sees them."""

    r: int = 16
    lora_alpha: float = 0.0
    target_modules: tuple[str, ...] = ()
    exclude_modules: tuple[str, ...] = ()
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    use_rslora: bool = False
    layers_to_transform: tuple[int, ...] = ()
    lora_dropout: float = 0.0
    init_lora_weights: str = "default"  # "default" (Kaiming-uniform A), "gaussian"; B starts at zero
    freeze_a: bool = False  # LoRA-FA: only B is trained


class TrainingSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Optimisation settings. `max_steps` 0: by epochs. `window_tokens` 0: chosen by the scheduler."""

    n_epochs: int = 3
    max_steps: int = 0
    batch_size: int = 8
    learning_rate: float = 2e-4
    lr_scheduler_type: str = "linear"
    warmup_steps: int | None = None
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    max_length: int = 0
    shuffle: bool = True
    optimizer: str = "adamw"  # or "adamw_8bit", "sgd"
    momentum: float = 0.9  # of sgd
    loraplus_lr_ratio: float = 1.0  # learning rate of B over that of A
    checkpoint_steps: int = 0
    window_tokens: int = 0
    packing: bool = False  # batch_size counts packs of up to max_length tokens instead of examples
    validation_split: float = 0.0  # share of the examples held out where no validation file is given
    eval_steps: int = 0  # 0: at each epoch's end, where there is validation data
    early_stopping_patience: int = 0  # evaluations without a better valid_loss; 0: never stop early
    early_stopping_threshold: float = 0.0
    label_smoothing: float = 0.0
    beta: float = 0.1  # of dpo
    kl_coef: float = 0.0  # weight of the KL estimate towards the base, per trained token


class JobSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A job as the engine gets it. Paths are absolute; `data_path` is a `TokenDataset` directory.

    `checkpoint_dir` is where the engine writes checkpoints (one directory a step) and looks for the newest
    whole one when the job starts. `init_path` is a PEFT directory (or checkpoint) whose weights the adapter
    starts from. `paused` starts it paused. Lower `priority` goes first; all jobs of `tenant` (a key's digest)
    have the weight `share` together. `validation_path` is a `TokenDataset` directory too. A model that is
    trained by calls has no paths, and its `method` is "calls".
    """

    job_id: str
    data_path: str
    checkpoint_dir: str
    seed: int
    lora: LoraSpec
    training: TrainingSpec
    base_model_name: str = ""
    init_path: str | None = None
    priority: int = 0
    tenant: str = ""
    share: float = 1.0
    paused: bool = False
    method: str = "supervised"  # or "dft", "dpo"; "calls"
    validation_path: str | None = None


class StepMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """One optimizer step: `loss` is the mean over the step's trained tokens (dpo: pairs), `grad_norm` before
    clipping.

    Everything but `tokens_per_second` and `share` (of the engine's time, 0-1) is replayed to the same bits.
    """

    step: int
    total_steps: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    trained_tokens: int  # that carried loss, in this step
    tokens: int  # all tokens of the step's examples
    shared_tokens: int = 0  # of them: computed once for several examples that begin alike, beyond the first
    accuracy: float | None = None  # right trained tokens (or pairs) by their number
    valid_loss: float | None = None  # of the whole validation set, where it was evaluated after this step
    valid_accuracy: float | None = None
    tokens_per_second: float = 0.0
    share: float = 0.0
    time: float = 0.0  # time.time() at commit
