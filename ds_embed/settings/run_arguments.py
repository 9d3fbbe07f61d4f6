"""The run: optimizer and schedule, folder, checkpoints, monitors."""

import importlib.util
from dataclasses import dataclass

from ds_embed.settings.errors import UserError
from ds_embed.settings.fields import Settings, optional, setting, several

SCHEDULES = ("cosine", "linear", "constant")
# The package that each needs.
MONITORS = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml", "csv": None, "none": None}


@dataclass(kw_only=True)
class JobArguments(Settings):
    rank_timeout_seconds: float = setting(
        "end the job if a rank is stopped, or its host does not respond, for this many seconds; 0 disables this. A rank "
        "that dies ends the job at once; a busy rank never does",
        60.0,
        at_least=0,
    )
    stall_timeout_seconds: float = setting(
        "end the job if a rank makes no progress for this many seconds while others wait for it; 0 disables this",
        540.0,
        at_least=0,
    )


@dataclass
class OptimizerArguments(Settings):
    max_steps: int | None = optional("optimizer steps to train (default: computed from num_train_epochs)", above=0)
    num_train_epochs: float | None = optional(
        "passes over the training data, rounded up to whole steps; training ends at this or at max_steps, whichever "
        "comes first (default: 1 unless max_steps is given)",
        above=0,
    )
    learning_rate: float = setting("peak learning rate", 1e-4, above=0)
    min_learning_rate: float = setting(
        "learning rate at the end of the schedule", 0.0, at_least=0, needs="lr_scheduler cosine linear|constant_steps"
    )
    lr_scheduler: str = setting(f"decay after warmup: {', '.join(SCHEDULES)}", "cosine", choices=SCHEDULES)
    warmup_steps: int = setting("steps of linear warmup to learning_rate", 0, at_least=0)
    warmup_ratio: float | None = optional(
        "warmup_steps as a share of all steps, rounded up; if a run is extended, of the new number of steps",
        at_least=0,
        below=1,
    )
    constant_steps: int = setting("number of final steps at min_learning_rate", 0, at_least=0)
    weight_decay: float = setting("AdamW weight decay; not applied to biases and norms", 0.01, at_least=0)
    adam_beta1: float = setting("AdamW decay of the first moment", 0.9, at_least=0, below=1)
    adam_beta2: float = setting("AdamW decay of the second moment", 0.98, at_least=0, below=1)
    adam_epsilon: float = setting("AdamW epsilon", 1e-8, above=0)
    max_grad_norm: float = setting("gradients are clipped to this global norm; 0 disables clipping", 1.0, at_least=0)

    def __post_init__(self):
        super().__post_init__()
        if self.warmup_ratio is not None and self.warmup_steps:
            raise UserError(
                f"--warmup_ratio {self.warmup_ratio}: give either this or --warmup_steps {self.warmup_steps}, not both"
            )
        if self.min_learning_rate > self.learning_rate:
            raise UserError(
                f"--min_learning_rate {self.min_learning_rate}: must not exceed --learning_rate {self.learning_rate}"
            )


@dataclass
class RunArguments(JobArguments):
    output_dir: str = setting("folder of the run, for its config, metrics, checkpoints and model")
    deepspeed: str = setting(
        "DeepSpeed JSON: a path, or the name of a shipped one (zero0 to zero3, zero2_offload, zero3_offload, zero3_hpz)"
    )
    bf16: bool = setting("bfloat16 weights and activations with a float32 optimizer; false computes in float32", True)
    seed: int = setting("seed of the data order, LoRA initialization and dropout", 42)
    save_interval: int = setting(
        "optimizer steps between checkpoints; 0 saves only at the end and when a signal stops the run", 0, at_least=0
    )
    save_each_epoch: bool = setting("also save a checkpoint at the end of each pass over the data", False)
    save_total_limit: int = setting("number of newest checkpoints to keep; 0 keeps all", 3, at_least=0)
    resume_if_exists: bool = setting("resume from the newest complete checkpoint in output_dir", True)
    accept_changes: list[str] = several("names of settings, data or model parts that may differ from the checkpoint")
    max_skipped_steps: int = setting(
        "maximum number of steps to skip because their loss or gradient is not finite; one more stops the run",
        0,
        at_least=0,
    )
    log_interval: int = setting("optimizer steps between lines of metrics.jsonl and monitor events", 1, above=0)
    report_to: list[str] = setting(
        f"monitors that receive the metrics in addition to metrics.jsonl: {', '.join(MONITORS)}",
        ["tensorboard"],
        choices=tuple(MONITORS),
    )
    report_project: str | None = optional(
        "project in Weights & Biases or Comet (default: from WANDB_PROJECT or COMET_PROJECT_NAME, else ds_embed)",
        needs="report_to wandb comet",
    )
    report_team: str | None = optional(
        "team in Weights & Biases, or workspace in Comet (default: your account's)", needs="report_to wandb comet"
    )
    run_name: str | None = optional(
        "name of the run in Weights & Biases or Comet (default: last part of output_dir)", needs="report_to wandb comet"
    )

    def __post_init__(self):
        super().__post_init__()
        for name in self.report_to:
            package = MONITORS[name]
            if package is not None and importlib.util.find_spec(package) is None:
                raise UserError(
                    f"--report_to {name}: the package {package} is not installed; pip install {package}, or leave it out"
                )
