"""The model: which one, its vectors, its LoRA matrices."""

from dataclasses import dataclass

from ds_embed.settings.checks import above_zero, at_least, one_of
from ds_embed.settings.errors import UserError
from ds_embed.settings.fields import setting

POOLINGS = ("mean", "cls", "last", "weighted_mean")


@dataclass
class ModelArguments:
    model_name_or_path: str = setting("model folder or hub name of the base model")
    pooling: str | None = setting(
        f"how token states become one vector: {', '.join(POOLINGS)} (default: last for decoders, mean for BERT)",
        default=None,
    )
    bidirectional: bool | None = setting(
        "let every token of a decoder see the whole text and not only what stands before it "
        "(default: as the trained model or its config.json says, else false)",
        default=None,
    )
    attn_implementation: str | None = setting(
        "attention kernel: sdpa, eager, flash_attention_2, ..., or math, ds_embed's own for training on CPUs, elsewhere "
        "the same as sdpa (default: math for training on CPUs, sdpa otherwise; eager where the model has neither)",
        default=None,
    )
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
            raise UserError(f"--lora_dropout {self.lora_dropout}: must be below 1")
