"""The DeepSpeed JSON: read, checked, and every "auto" filled in from our settings."""

import json
from pathlib import Path
from typing import Any

from ds_embed.settings.errors import UserError
from ds_embed.settings.shipped import shipped_folder

# Keys that our flags decide; in the JSON they must be missing or "auto".
_OURS = {
    "train_batch_size": "--global_batch_size",
    "train_micro_batch_size_per_gpu": "--micro_batch_tokens",
    "gradient_accumulation_steps": "--global_batch_size",
    "optimizer": "--learning_rate, --weight_decay and --adam_*",
    "scheduler": "--lr_scheduler and --warmup_steps",
    "gradient_clipping": "--max_grad_norm",
    "tensorboard": "--report_to",
    "wandb": "--report_to, --report_project, --report_team and --run_name",
    "comet": "--report_to, --report_project, --report_team and --run_name",
    "csv_monitor": "--report_to",
}
_REFUSED = {
    "fp16": "float16 needs loss scaling, which the step does not do; use --bf16 true, or --bf16 false for float32",
    "activation_checkpointing": "use --gradient_checkpointing true",
    "pipeline": "models are not split into pipeline stages",
}


def resolve_deepspeed_config(path: str, *, bf16: bool, max_grad_norm: float, num_ranks: int = 1) -> dict[str, Any]:
    """Return the DeepSpeed config from the JSON at `path`, or the shipped one of that name, with every "auto" resolved.

    The contrastive step controls batch, accumulation, optimizer and schedule; a JSON that sets one of them is
    refused, because its value would have no effect. Raises UserError naming the key.
    num_ranks: number of ranks of the job; must be a multiple of the hpZ group size.
    """
    path = _resolve_name(path)
    config = _read(path)
    for key, flag in _OURS.items():
        if config.get(key, "auto") != "auto":
            raise UserError(f'{path}: "{key}" is set by {flag}; remove the key or make it "auto"')
        config.pop(key, None)
    for key, cure in _REFUSED.items():
        section = config.get(key)
        if (isinstance(section, dict) and section.get("enabled", True) in (True, "auto")) or section is True:
            raise UserError(f'{path}: "{key}" is not supported: {cure}')
        config.pop(key, None)
    _fill_precision(path, config, bf16)
    zero = config.setdefault("zero_optimization", {"stage": 0})
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise UserError(f'{path}: "zero_optimization.stage" is {stage!r}; choose 0, 1, 2 or 3')
    if stage in (1, 2) and not zero.get("contiguous_gradients", True):
        raise UserError(f'{path}: "contiguous_gradients": false is not supported; remove the key')
    group = zero.get("zero_hpz_partition_size", 1)
    if group > 1 and num_ranks % group:
        raise UserError(
            f'{path}: "zero_hpz_partition_size" is {group}, which does not divide the {num_ranks} rank(s) of this job; '
            "set it to the number of GPUs of a node, start as many ranks on every node, or use ds_configs/zero3.json"
        )
    if zero.get("mics_shard_size", -1) > 0:
        raise UserError(f'{path}: "mics_shard_size" is not supported; use "zero_hpz_partition_size" (zero3_hpz.json)')
    # The plan splits the batch, so DeepSpeed sees one micro-batch per rank and step.
    config["train_micro_batch_size_per_gpu"] = 1
    config["gradient_accumulation_steps"] = 1
    config["gradient_clipping"] = float(max_grad_norm)
    config.setdefault("steps_per_print", 10**9)  # our own log covers every step
    # The optimizer is torch's AdamW: it needs no compiler, and its fused version is as fast as DeepSpeed's own.
    config["zero_allow_untested_optimizer"] = True
    config["zero_force_ds_cpu_optimizer"] = False
    if config["bf16"]["enabled"] and stage in (1, 2, 3):
        # A step may sum many micro-batches; a sum in bfloat16 would lose their small gradients.
        config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    leftover = _find_auto(config, "")
    if leftover:
        raise UserError(f'{path}: "{leftover}" is "auto" but no flag decides it; give it a value')
    return config


def _resolve_name(path: str) -> str:
    """The path of a shipped JSON given by its bare name, such as zero3; anything else is already a path."""
    if Path(path).exists():
        return path
    shipped = shipped_folder("ds_configs")
    named = Path(path).name.removesuffix(".json")
    if Path(path).parent in (Path(), Path("ds_configs")) and (shipped / f"{named}.json").is_file():
        return str(shipped / f"{named}.json")
    return path


def _read(path: str) -> dict[str, Any]:
    file = Path(path)
    if file.is_dir() or not file.exists():
        what = "is a directory" if file.is_dir() else "no such file"
        ready = ", ".join(sorted(p.stem for p in shipped_folder("ds_configs").glob("*.json")))
        raise UserError(f"--deepspeed {path}: {what}; give the path of a DeepSpeed JSON or a shipped one: {ready}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise UserError(f"--deepspeed {path}: not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(config).__name__}")
    return config


def _fill_precision(path: str, config: dict, bf16: bool) -> None:
    section = config.setdefault("bf16", {"enabled": "auto"})
    if section.get("enabled", "auto") == "auto":
        section["enabled"] = bf16
    elif section["enabled"] != bf16:
        raise UserError(
            f'{path}: "bf16.enabled" is {str(section["enabled"]).lower()} but --bf16 is {str(bf16).lower()}; '
            'make the key "auto" and let --bf16 decide'
        )
    # A gradient that is not finite must not reach the weights; DeepSpeed then skips the step, and the loop counts it.
    if section["enabled"]:
        section.setdefault("check_grad_overflow", True)


def _find_auto(node: Any, name: str) -> str | None:
    if node == "auto":
        return name
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        found = _find_auto(value, f"{name}.{key}" if name else str(key))
        if found:
            return found
    return None
