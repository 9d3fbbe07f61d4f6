"""The run: optimizer and schedule, folder, checkpoints, monitors."""

import importlib.util
from dataclasses import dataclass

from ds_embed.settings.errors import UserError
from ds_embed.settings.fields import Settings, setting
from ds_embed.settings.job_arguments import JobArguments

SCHEDULES = ("cosine", "linear", "constant")
# The package that each needs.
MONITORS = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml", "csv": None, "none": None}


@dataclass
class OptimizerArguments(Settings):
    max_steps: int | None = setting(
        "optimizer steps to train (default: what num_train_epochs gives)", default=None, above=0
    )
    num_train_epochs: float | None = setting(
        "passes over the training data, rounded up to whole steps; the first limit reached ends training "
        "(default: 1 unless max_steps is given)",
        default=None,
        above=0,
    )
    learning_rate: float = setting("peak learning rate", default=1e-4, above=0)
    min_learning_rate: float = setting("learning rate at the end of the schedule", default=0.0, at_least=0)
    lr_scheduler: str = setting(f"decay after warmup: {', '.join(SCHEDULES)}", default="cosine", choices=SCHEDULES)
    warmup_steps: int = setting("steps of linear rise to learning_rate", default=0, at_least=0)
    warmup_ratio: float | None = setting(
        "warmup_steps as a share of all steps, rounded up; of a run that goes on to more steps, of those",
        default=None,
        at_least=0,
        below=1,
    )
    constant_steps: int = setting("last steps, spent at min_learning_rate", default=0, at_least=0)
    weight_decay: float = setting("AdamW weight decay; biases and norms have none", default=0.01, at_least=0)
    adam_beta1: float = setting("AdamW decay of the first moment", default=0.9, at_least=0, below=1)
    adam_beta2: float = setting("AdamW decay of the second moment", default=0.98, at_least=0, below=1)
    adam_epsilon: float = setting("AdamW epsilon", default=1e-8, above=0)
    max_grad_norm: float = setting(
        "gradients are clipped to this global norm; 0 clips nothing", default=1.0, at_least=0
    )

    def __post_init__(self):
        super().__post_init__()
        if self.warmup_ratio is not None and self.warmup_steps:
            raise UserError(
                f"--warmup_ratio {self.warmup_ratio}: give it or --warmup_steps {self.warmup_steps}, not both"
            )
        if self.min_learning_rate > self.learning_rate:
            raise UserError(
                f"--min_learning_rate {self.min_learning_rate}: must not exceed --learning_rate {self.learning_rate}"
            )


@dataclass
class RunArguments(JobArguments):
    output_dir: str = setting("folder of the run: config, metrics, model")
    deepspeed: str = setting(
        "DeepSpeed JSON: a path, or the name of a shipped one (zero0 to zero3, zero2_offload, zero3_offload, zero3_hpz)"
    )
    bf16: bool = setting("bfloat16 weights and activations, float32 optimizer; false computes in float32", default=True)
    seed: int = setting("seed of the data order, LoRA initialisation and dropout", default=42)
    save_interval: int = setting(
        "optimizer steps between checkpoints; 0 saves only at the end and when a signal stops the run",
        default=0,
        at_least=0,
    )
    save_each_epoch: bool = setting("also save a checkpoint at the end of each pass over the data", default=False)
    save_total_limit: int = setting("checkpoints kept, the newest ones; 0 keeps all", default=3, at_least=0)
    resume_if_exists: bool = setting("go on from the newest whole checkpoint in output_dir", default=True)
    accept_changes: list[str] = setting(
        "names of settings, data or model parts that may differ from those of the checkpoint", default_factory=list
    )
    max_skipped_steps: int = setting(
        "steps of a run that are skipped when their loss or gradient is not finite; one more stops it",
        default=0,
        at_least=0,
    )
    log_interval: int = setting("optimizer steps between lines of metrics.jsonl and monitor events", default=1, above=0)
    report_to: list[str] = setting(
        f"monitors that get the metrics besides metrics.jsonl: {', '.join(MONITORS)}",
        default_factory=lambda: ["tensorboard"],
        choices=tuple(MONITORS),
    )
    report_project: str | None = setting(
        "project in Weights & Biases or Comet (default: that of WANDB_PROJECT or COMET_PROJECT_NAME, else ds_embed)",
        default=None,
    )
    report_team: str | None = setting(
        "team in Weights & Biases, workspace in Comet (default: that of your account)", default=None
    )
    run_name: str | None = setting(
        "name of the run in Weights & Biases or Comet (default: the last part of output_dir)", default=None
    )

    def __post_init__(self):
        super().__post_init__()
        for name in self.report_to:
            package = MONITORS[name]
            if package is not None and importlib.util.find_spec(package) is None:
                raise UserError(
                    f"--report_to {name}: the package {package} is not installed; pip install {package}, or leave it out"
                )
