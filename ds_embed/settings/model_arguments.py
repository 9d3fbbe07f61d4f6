"""The model: which one, its vectors, its LoRA matrices."""

from dataclasses import dataclass, replace
from typing import Any

from ds_embed.settings.errors import UserError
from ds_embed.settings.fields import Settings, setting

POOLINGS = ("mean", "cls", "last", "weighted_mean", "max", "mean_sqrt_len")
LORA_VARIANTS = ("lora", "rslora", "dora", "pissa")
QUANTIZATIONS = ("nf4",)


@dataclass
class ModelArguments(Settings):
    model_name_or_path: str = setting("model folder or hub name: a base model, a run, a LoRA adapter")
    adapter_path: str | None = setting("run or PEFT folder whose LoRA adapter goes on the base model", default=None)
    model_revision: str | None = setting(
        "branch, tag or commit of a hub name's repository, for all of its files (default: main)", default=None
    )
    step: int | None = setting(
        "step of a run whose checkpoint is encoded instead of RUN/model; such as RUN/checkpoints/step_00000100 itself "
        "(training starts from one that was exported)",
        default=None,
    )
    pooling: str | None = setting(
        f"how token states become one vector: {', '.join(POOLINGS)}, or several with + in between, concatenated "
        "(default: as the model's own files say, else last for decoders, mean for BERT)",
        default=None,
    )
    normalize: bool | None = setting(
        "make vectors of length 1 (default: as the model's own files say, else true)", default=None
    )
    bidirectional: bool | None = setting(
        "let every token of a decoder see the whole text and not only what stands before it "
        "(default: as the model is, by itself or by its training)",
        default=None,
    )
    attn_implementation: str | None = setting(
        "attention kernel: sdpa, eager, flash_attention_2, ..., or math, ds_embed's own for training on CPUs, elsewhere "
        "the same as sdpa (default: math for training on CPUs, sdpa otherwise; eager where the model has neither)",
        default=None,
    )
    trust_remote_code: bool = setting("run Python code that comes with the model", default=False)
    load_in_4bit: str | None = setting(
        "nf4: hold the linear layers of the base model in 4 bits (Dettmers et al. 2023), by bitsandbytes: for encoding, "
        "and frozen under the LoRA matrices that are trained, which fit the whole base model too; not under ZeRO-3 "
        "(default: in the precision of --bf16)",
        default=None,
        choices=QUANTIZATIONS,
    )

    def __post_init__(self):
        super().__post_init__()
        for name in (self.pooling or "").split("+") if self.pooling is not None else []:
            if name not in POOLINGS:
                raise UserError(
                    f"--pooling {self.pooling}: choose one of {', '.join(POOLINGS)}, or several joined by +"
                )


@dataclass
class LoraArguments(Settings):
    """None stands for a default that only the model tells: a LoRA run trained further keeps its own settings."""

    lora_rank: int | None = setting(
        "rank of the LoRA matrices; 0 trains all weights, those of a LoRA run merged into its base first "
        "(default: that of the LoRA run that is trained further, else 16 for decoders and 0 for BERT)",
        default=None,
        at_least=0,
    )
    lora_alpha: float | None = setting(
        "LoRA scale: updates are multiplied by lora_alpha / lora_rank (default: the run's own, else 32)",
        default=None,
        above=0,
    )
    lora_dropout: float | None = setting(
        "dropout probability on the input of the LoRA matrices (default: the run's own, else 0)",
        default=None,
        at_least=0,
        below=1,
    )
    lora_target_modules: list[str] | None = setting(
        "names of the modules that get LoRA matrices, or all-linear (default: the run's own, else all-linear)",
        default=None,
    )
    lora_variant: str | None = setting(
        "lora; rslora: scaled by lora_alpha / sqrt(lora_rank); dora: with a trained length for each row of a weight; "
        "pissa: starts at the largest singular values of a weight, and is saved as a lora of twice the rank "
        "(default: the run's own, else lora)",
        default=None,
        choices=LORA_VARIANTS,
    )
    new_lora: bool = setting(
        "merge the LoRA run that is trained further into its base, in float32 as RUN/base, and start new matrices "
        "instead of going on with its own",
        default=False,
    )

    def with_defaults(self, rank: int) -> "LoraArguments":
        """The same, with the defaults of new matrices for what is not set; `rank` is that of the rank."""
        defaults: dict[str, Any] = dict(
            lora_rank=rank, lora_alpha=32.0, lora_dropout=0.0, lora_target_modules=["all-linear"], lora_variant="lora"
        )
        return replace(self, **{name: value for name, value in defaults.items() if getattr(self, name) is None})
