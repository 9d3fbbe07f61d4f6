"""Further training of LoRA runs: of their own matrices, or of new ones after merging the old ones into the base."""

import json
import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ds_embed.artifact.durable import folder_when_whole
from ds_embed.artifact.identity import check_unchanged, identify_model
from ds_embed.models.adapters import changes_base, read_adapter
from ds_embed.models.card import EmbeddingCard
from ds_embed.models.kinds import backbone_class, is_bert_style, kind_of, without_pooler
from ds_embed.models.loading import ModelSource, load_config, load_encoder
from ds_embed.models.lora import last_parts, linear_modules
from ds_embed.settings import LoraArguments
from ds_embed.settings.errors import UserError
from ds_embed.settings.fields import listed

logger = logging.getLogger(__name__)


def resolve_lora(arguments: LoraArguments, source: ModelSource, config: Any, trust_remote_code: bool) -> LoraArguments:
    """The settings with unset ones filled in from the LoRA run that is trained further, else from the defaults.

    config: the base model's transformers config. UserError if they differ from the run's matrices without requesting
    new ones.
    """
    if source.checkpoint is not None:
        raise UserError(
            f"--model_name_or_path {source.checkpoint}: is a checkpoint, and training starts from a model; start the run's "
            f"own command again to go on with it, or write a model by ds-embed export --run {source.checkpoint}"
        )
    if source.adapter is None:
        if arguments.new_lora:
            raise UserError("--new_lora true: the model is no LoRA run, so its matrices are new anyway; leave it out")
        is_decoder = not is_bert_style(config) or kind_of(config, trust_remote_code, source.base).is_causal
        resolved = arguments.with_defaults(16 if is_decoder else 0)
        # Those of a config.yaml that a run without matrices wrote are the defaults.
        unused = asdict(arguments).items() if not resolved.lora_rank else ()
        for name, value in unused:
            if value not in (None, getattr(LoraArguments().with_defaults(0), name)):
                raise UserError(f"--{name} {listed(value)}: needs a --lora_rank, such as 16")
        _check_4bit(source, resolved)
        _check_targets(resolved, source, config, trust_remote_code)
        return resolved
    adapter = read_adapter(source.adapter)
    targets = adapter.target_modules or []
    own = LoraArguments(
        lora_rank=adapter.r,
        lora_alpha=float(adapter.lora_alpha),
        lora_dropout=adapter.lora_dropout,
        lora_target_modules=[targets] if isinstance(targets, str) else sorted(last_parts(targets)),
        lora_variant="dora" if adapter.use_dora else "rslora" if adapter.use_rslora else "lora",
    )
    given = {name: value for name, value in asdict(arguments).items() if value is not None}
    resolved = replace(own, **given)
    _check_4bit(source, resolved)
    if not resolved.lora_rank or resolved.new_lora:
        _check_targets(resolved, source, config, trust_remote_code)
        return resolved
    for name in ("lora_rank", "lora_alpha", "lora_target_modules", "lora_variant"):
        asked, known = getattr(resolved, name), getattr(own, name)
        meant = asked
        if name == "lora_target_modules" and asked is not known:
            if asked == ["all-linear"]:
                meant = linear_modules(_without_weights(source, config, trust_remote_code))
            meant = sorted(last_parts(meant))
        if meant != known:
            raise UserError(
                f"--{name} {listed(asked)}: the LoRA run that is trained further, {source.adapter}, has {listed(known)}; "
                "leave the flag out to go on with its matrices, or set --new_lora true to merge them into the base and "
                "start new ones"
            )
    if changes_base(adapter):
        raise UserError(
            f"{source.adapter}: init_lora_weights {adapter.init_lora_weights} changes the base model's weights, so its "
            "matrices can't be trained further; set --new_lora true to merge them into the base and start new ones"
        )
    return replace(resolved, lora_target_modules=own.lora_target_modules)


def _check_4bit(source: ModelSource, resolved: LoraArguments) -> None:
    flag = f"--load_in_4bit {source.load_in_4bit}"
    if source.load_in_4bit is not None and not resolved.lora_rank:
        raise UserError(f"{flag}: weights in 4 bits can't be trained; set --lora_rank, such as 16, or leave it out")
    if source.load_in_4bit is not None and resolved.lora_variant == "pissa":
        raise UserError(f"--lora_variant pissa: changes the base model's weights, which {flag} rounds; choose another")


def _check_targets(resolved: LoraArguments, source: ModelSource, config: Any, trust_remote_code: bool) -> None:
    """UserError for a name that no module has; PEFT only complains if none of the names matches."""
    if not resolved.lora_rank or resolved.lora_target_modules == ["all-linear"]:
        return
    model = _without_weights(source, config, trust_remote_code)
    names = [f".{name}" for name, _ in model.named_modules()]
    for target in resolved.lora_target_modules or ():
        if not target or not any(name.endswith(f".{target}") for name in names):
            raise UserError(
                f"--lora_target_modules {target}: no module of {source.base} has this name; linear modules of this model: "
                f"{', '.join(sorted(linear_modules(model)))}"
            )


def _without_weights(source: ModelSource, config: Any, trust_remote_code: bool) -> torch.nn.Module:
    with torch.device("meta"):
        return backbone_class(config, trust_remote_code, source.base)(config, **without_pooler(config))


def merge_adapter(source: ModelSource, card: EmbeddingCard, folder: Path, trust_remote_code: bool) -> None:
    """Write the base model with the adapter merged, in float32, to `folder`, whole or not at all.

    An existing folder is kept if it was made from the same weights; otherwise UserError.
    """
    commit = getattr(load_config(source, trust_remote_code), "_commit_hash", None)
    made_from, record = identify_model(source.base, source.adapter, commit), folder / "merged_from.json"
    if folder.exists():
        check_unchanged(folder, json.loads(record.read_text("utf-8")), made_from, (), "--output_dir")
        return
    logger.info("merging %s into %s: %s", source.adapter, source.base, folder)
    source = replace(source, load_in_4bit=None)
    encoder = load_encoder(source, **card.encoding, bf16=False, trust_remote_code=trust_remote_code)
    with folder_when_whole(folder) as part:
        encoder.backbone.merge_and_unload(safe_merge=True).save_pretrained(part)
        (part / record.name).write_text(json.dumps(made_from, indent=2) + "\n", "utf-8")
