"""Argument dataclasses. A field is a flag and a YAML key; its help line gives its unit."""

from dataclasses import dataclass, field

from ds_embed.config.checks import above_zero, at_least, existing_files, one_of

POOLINGS = ("mean", "cls", "last", "weighted_mean")
NEGATIVES = ("all", "own", "pair")
SCHEDULES = ("cosine", "linear", "constant")
MONITORS = ("tensorboard", "wandb", "comet", "csv", "none")
DEFAULT_MAX_LENGTH = 512
DEFAULT_QUERY_PREFIX = "query: "
DEFAULT_DOC_PREFIX = "passage: "


def setting(help: str, **kwargs):
    return field(metadata={"help": help}, **kwargs)


@dataclass
class ModelArguments:
    model_name_or_path: str = setting("model folder or hub name of the base model")
    pooling: str | None = setting(
        f"how token states become one vector: {', '.join(POOLINGS)} (default: last for decoders, mean for BERT)",
        default=None,
    )
    attn_implementation: str = setting("attention kernel: sdpa, eager, flash_attention_2, ...", default="sdpa")
    trust_remote_code: bool = setting("run Python code that comes with the model", default=False)

    def __post_init__(self):
        if self.pooling is not None:
            one_of(self, "pooling", POOLINGS)


@dataclass
class LoraArguments:
    lora_rank: int = setting("rank of the LoRA matrices; 0 trains all weights", default=16)
    lora_alpha: float = setting("LoRA scale: updates are multiplied by lora_alpha / lora_rank", default=32.0)
    lora_dropout: float = setting("dropout probability on the input of the LoRA matrices", default=0.0)
    lora_target_modules: list[str] = setting(
        "names of the modules that get LoRA matrices, or all-linear", default_factory=lambda: ["all-linear"]
    )

    def __post_init__(self):
        at_least(self, 0, "lora_rank", "lora_dropout")
        above_zero(self, "lora_alpha")
        if not self.lora_dropout < 1:
            raise ValueError(f"--lora_dropout {self.lora_dropout}: must be below 1")


@dataclass
class TextArguments:
    """How a text becomes tokens; the same fields are stored beside a trained model."""

    max_length: int | None = setting(
        "longest text in tokens, special tokens included; the rest is cut off "
        f"(default: the trained model's, else {DEFAULT_MAX_LENGTH})",
        default=None,
    )
    query_max_length: int | None = setting("longest query in tokens (default: max_length)", default=None)
    doc_max_length: int | None = setting("longest document in tokens (default: max_length)", default=None)
    query_prefix: str | None = setting(
        f"text put in front of every query (default: the trained model's, else '{DEFAULT_QUERY_PREFIX}')", default=None
    )
    doc_prefix: str | None = setting(
        f"text put in front of every document (default: the trained model's, else '{DEFAULT_DOC_PREFIX}')", default=None
    )

    def __post_init__(self):
        above_zero(self, "max_length", "query_max_length", "doc_max_length")


@dataclass
class DataArguments(TextArguments):
    train_files: list[str] = setting("JSON or JSONL training files", default_factory=list)
    hard_negatives: int = setting("hard negatives (neg_doc) used per query", default=0)
    cache_dir: str = setting(
        "folder for prepared tokens, seen by all nodes and reused by later runs", default="~/.cache/ds_embed"
    )

    def __post_init__(self):
        super().__post_init__()
        existing_files("train_files", self.train_files)
        at_least(self, 0, "hard_negatives")


@dataclass
class StepArguments:
    global_batch_size: int = setting("queries per optimizer step, over all ranks", default=64)
    micro_batch_tokens: int = setting("padded tokens per forward pass of one rank: sets the memory", default=4096)
    negatives: str = setting(
        "documents a query is scored against: all (every document of the batch), own (all positives and its own "
        "hard negatives), pair (its positive against each own hard negative, two at a time)",
        default="all",
    )
    temperature: float = setting("similarities are divided by this before the softmax", default=0.02)
    grad_cache: bool = setting(
        "encode twice to keep no graph of the whole batch: exact, any batch size in the memory of one micro-batch",
        default=False,
    )
    gradient_checkpointing: bool = setting("recompute activations in backward to save memory", default=False)

    def __post_init__(self):
        above_zero(self, "global_batch_size", "micro_batch_tokens", "temperature")
        one_of(self, "negatives", NEGATIVES)


@dataclass
class OptimizerArguments:
    max_steps: int | None = setting("optimizer steps to train (default: what num_train_epochs gives)", default=None)
    num_train_epochs: float | None = setting(
        "passes over the training data, rounded up to whole steps; the first limit reached ends training "
        "(default: 1 unless max_steps is given)",
        default=None,
    )
    learning_rate: float = setting("peak learning rate", default=1e-4)
    min_learning_rate: float = setting("learning rate at the end of the schedule", default=0.0)
    lr_scheduler: str = setting(f"decay after warmup: {', '.join(SCHEDULES)}", default="cosine")
    warmup_steps: int = setting("steps of linear rise to learning_rate", default=0)
    constant_steps: int = setting("last steps, spent at min_learning_rate", default=0)
    weight_decay: float = setting("AdamW weight decay; biases and norms have none", default=0.01)
    adam_beta1: float = setting("AdamW decay of the first moment", default=0.9)
    adam_beta2: float = setting("AdamW decay of the second moment", default=0.98)
    adam_epsilon: float = setting("AdamW epsilon", default=1e-8)
    max_grad_norm: float = setting("gradients are clipped to this global norm; 0 clips nothing", default=1.0)

    def __post_init__(self):
        above_zero(self, "max_steps", "num_train_epochs", "learning_rate", "adam_epsilon")
        at_least(self, 0, "min_learning_rate", "warmup_steps", "constant_steps", "weight_decay", "max_grad_norm")
        one_of(self, "lr_scheduler", SCHEDULES)
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: must be in [0, 1)")
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"--min_learning_rate {self.min_learning_rate}: must not exceed --learning_rate {self.learning_rate}"
            )


@dataclass
class RunArguments:
    output_dir: str = setting("folder of the run: config, metrics, model")
    deepspeed: str = setting("path of the DeepSpeed JSON (see ds_configs/)")
    bf16: bool = setting("bfloat16 weights and activations, float32 optimizer; false computes in float32", default=True)
    seed: int = setting("seed of the data order, LoRA initialisation and dropout", default=42)
    save_interval: int = setting(
        "optimizer steps between checkpoints; 0 saves only at the end and when a signal stops the run", default=0
    )
    save_total_limit: int = setting("checkpoints kept, the newest ones; 0 keeps all", default=3)
    resume_if_exists: bool = setting("go on from the newest whole checkpoint in output_dir", default=True)
    accept_changes: list[str] = setting(
        "names of settings, data or model parts that may differ from those of the checkpoint", default_factory=list
    )
    max_skipped_steps: int = setting(
        "steps of a run that are skipped when their loss or gradient is not finite; one more stops it", default=0
    )
    log_interval: int = setting("optimizer steps between lines of metrics.jsonl and monitor events", default=1)
    report_to: list[str] = setting(
        f"monitors that get the metrics besides metrics.jsonl: {', '.join(MONITORS)}",
        default_factory=lambda: ["tensorboard"],
    )

    def __post_init__(self):
        above_zero(self, "log_interval")
        at_least(self, 0, "save_interval", "save_total_limit", "max_skipped_steps")
        for name in self.report_to:
            if name not in MONITORS:
                raise ValueError(f"--report_to {name}: choose from {', '.join(MONITORS)}")


@dataclass
class EncodeArguments:
    """Texts to encode. What decides a vector comes from the model's card; a flag is needed for base models only."""

    adapter_path: str | None = setting("run or PEFT folder whose LoRA adapter goes on the base model", default=None)
    deepspeed: str | None = setting(
        "path of a DeepSpeed JSON; with ZeRO-3 no GPU holds the whole model (default: each rank holds it)",
        default=None,
    )
    bf16: bool = setting("bfloat16 weights and activations; false computes in float32", default=True)
    query_files: list[str] = setting("JSON or JSONL files of queries: query, query_id", default_factory=list)
    doc_files: list[str] = setting("JSON or JSONL files of documents: pos_doc, doc_id", default_factory=list)
    output_prefix: str = setting("folder that gets consumed_samplesX/", default="embeddings")
    micro_batch_tokens: int = setting("padded tokens per forward pass of one rank: sets the memory", default=16384)
    cache_dir: str = setting(
        "folder for prepared tokens, seen by all nodes and reused by later runs", default="~/.cache/ds_embed"
    )

    def __post_init__(self):
        if not self.query_files and not self.doc_files:
            raise ValueError("nothing to encode: give --query_files, --doc_files or both")
        for name in ("query_files", "doc_files"):
            if getattr(self, name):
                existing_files(name, getattr(self, name))
        above_zero(self, "micro_batch_tokens")
