"""The model: which one, its vectors, its LoRA matrices."""

from dataclasses import dataclass, replace
from typing import Any

from ds_embed.settings.errors import UserError
from ds_embed.settings.fields import Settings, optional, setting

POOLINGS = ("mean", "cls", "last", "weighted_mean", "max", "mean_sqrt_len")
LORA_VARIANTS = ("lora", "rslora", "dora", "pissa")
QUANTIZATIONS = ("nf4",)


@dataclass
class ModelArguments(Settings):
    model_name_or_path: str = setting("model folder or hub name: a base model, a run, a LoRA adapter")
    adapter_path: str | None = optional("run or PEFT folder with a LoRA adapter to load on the base model")
    model_revision: str | None = optional(
        "branch, tag or commit of the model's hub repository, for all of its files (default: main)"
    )
    step: int | None = optional(
        "use the checkpoint of this step of a run instead of RUN/model; equivalent to giving the folder "
        "RUN/checkpoints/step_00000100 (to train from a checkpoint, export it first)"
    )
    pooling: str | None = optional(
        f"how the hidden states are pooled into one vector: {', '.join(POOLINGS)}, or several joined by +, which are "
        "concatenated (default: from the model's own files, else last for decoders, mean for BERT)"
    )
    normalize: bool | None = optional("scale vectors to unit length (default: from the model's own files, else true)")
    bidirectional: bool | None = optional(
        "use bidirectional instead of causal attention in a decoder (default: as the model was built or trained)"
    )
    attn_implementation: str | None = optional(
        "attention implementation: sdpa, eager, flash_attention_2, ...; math, which is ds_embed's own for training on "
        "CPUs and the same as sdpa elsewhere; or varlen, which computes texts one behind the other without padding, by "
        "torch's operator on GPUs (default: varlen on GPUs where model, precision and GPU allow, math for training on "
        "CPUs, else sdpa; eager if the model supports neither)"
    )
    trust_remote_code: bool = setting("run Python code shipped with the model", False)
    load_in_4bit: str | None = optional(
        "nf4: hold the linear layers of the base model in 4 bits (Dettmers et al. 2023) with bitsandbytes, for encoding "
        "or for training LoRA matrices on the frozen base; the matrices also work with the base model in full precision; "
        "not under ZeRO-3 (default: the precision of --bf16)",
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
    """None means a default that depends on the model: a LoRA run that is trained further keeps its own settings."""

    lora_rank: int | None = optional(
        "rank of the LoRA matrices; 0 trains all weights, after merging the LoRA matrices of a run into its base "
        "(default: the rank of the LoRA run that is trained further, else 16 for decoders and 0 for BERT)",
        at_least=0,
    )
    lora_alpha: float | None = optional(
        "LoRA scale: updates are multiplied by lora_alpha / lora_rank (default: from the run, else 32)", above=0
    )
    lora_dropout: float | None = optional(
        "dropout probability on the input of the LoRA matrices (default: from the run, else 0)", at_least=0, below=1
    )
    lora_target_modules: list[str] | None = optional(
        "names of the modules that get LoRA matrices, or all-linear (default: from the run, else all-linear)"
    )
    lora_variant: str | None = optional(
        "lora; rslora: scaled by lora_alpha / sqrt(lora_rank); dora: with a trained magnitude per row of a weight; "
        "pissa: initialized from the largest singular values of a weight, and saved as a LoRA of twice the rank "
        "(default: from the run, else lora)",
        choices=LORA_VARIANTS,
    )
    new_lora: bool = setting(
        "merge the LoRA run that is trained further into its base (in float32, as RUN/base) and start new matrices, "
        "instead of continuing with the existing ones",
        False,
    )

    def with_defaults(self, rank: int) -> "LoraArguments":
        """Return a copy in which unset values have the defaults of new matrices; `rank` is the default rank."""
        defaults: dict[str, Any] = dict(
            lora_rank=rank, lora_alpha=32.0, lora_dropout=0.0, lora_target_modules=["all-linear"], lora_variant="lora"
        )
        return replace(self, **{name: value for name, value in defaults.items() if getattr(self, name) is None})
