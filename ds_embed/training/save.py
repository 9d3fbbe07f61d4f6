"""Save a trained model as users load it: a PEFT adapter or a whole Hugging Face model, with its card."""

import copy
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ds_embed.job.ranks import World
from ds_embed.models.attention import BidirectionalAttention
from ds_embed.models.card import EmbeddingCard
from ds_embed.models.checkpoint import checkpoint_path, damage, read_state
from ds_embed.models.encoder import LOG_SCALE_CHANGE, PROJECTION, TextEncoder, learned_temperature
from ds_embed.models.engine import gather_weights
from ds_embed.models.kinds import direction_in_config, without_pooler
from ds_embed.models.lora import save_adapter
from ds_embed.models.sentence_transformers import write_modules
from ds_embed.models.tokenizer import save_tokenizer, tokenizer_for_others
from ds_embed.settings.data_arguments import TEXT_PLACE
from ds_embed.settings.errors import UserError
from ds_embed.training.best import BestValidations
from ds_embed.training.checkpoint import load_checkpoint
from ds_embed.training.run_folder import RunFolder

_PREFIX, _HEAD = "backbone.", "head."

logger = logging.getLogger(__name__)


def save_model(encoder: TextEncoder, tokenizer: Any, card: EmbeddingCard, folder: RunFolder, world: World) -> None:
    """Write RUN/model/. Every rank must call it: under ZeRO the weights are gathered first.

    A learned temperature is written to the card; until then card.temperature is its initial value.
    """
    trained = {name for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    is_adapter = len(trained) < sum(1 for _ in encoder.parameters())
    weights = gather_weights(encoder, trained if is_adapter else None, world)
    head = {name.removeprefix(_HEAD): weights.pop(name) for name in list(weights) if name.startswith(_HEAD)}
    weights = {name.removeprefix(_PREFIX): tensor for name, tensor in weights.items()}
    weights.pop(PROJECTION, None)  # used only in training
    change = weights.pop(LOG_SCALE_CHANGE, None)
    if change is not None:
        card = replace(card, temperature=learned_temperature(card.temperature, change.squeeze()).item())

    if is_adapter:
        # In addition to PEFT's absolute path, store a relative one, so that a run can be moved together with its base.
        base = encoder.backbone.peft_config["default"].base_model_name_or_path
        card = replace(card, base_model=os.path.relpath(base, folder.model_dir) if Path(base).is_dir() else base)

    def fill(target: Path) -> None:
        direction = _direction(encoder, card, is_adapter)
        if is_adapter:
            _check_adapter(weights)
            save_adapter(encoder, weights, target)
        else:
            encoder.backbone.save_pretrained(target, state_dict=weights)
            if direction:
                config = copy.deepcopy(encoder.backbone.config)
                config.update(direction)
                config.save_pretrained(target)
        config = encoder.backbone.config
        dimensions = config.get_text_config().hidden_size
        save_tokenizer(tokenizer_for_others(tokenizer, card), target)
        write_modules(target, card, dimensions, head, without_pooler(config), direction if is_adapter else None)

    for name in ("query_prefix", "doc_prefix"):
        if world.is_main and (behind := getattr(card, name).partition(TEXT_PLACE)[2]):
            logger.warning(
                "only ds_embed applies the part of --%s after the text (%r): other libraries give different vectors",
                name,
                behind,
            )
    world.on_main("save model", lambda: folder.publish_model(fill))


def load_best(engine: Any, best: BestValidations, last_step: int, folder: RunFolder, world: World) -> int | None:
    """Load the best checkpoint into the engine if requested and not already loaded; return its samples, else None.

    Every rank must call it. UserError if the checkpoint is damaged.
    """
    chosen = best.to_load
    if chosen is None or chosen.step == last_step:
        return None
    path = checkpoint_path(folder.checkpoints_dir, chosen.step)

    def verify() -> dict[str, Any]:
        problem = damage(path)
        if problem is not None:
            raise UserError(
                f"--load_best_at_end: {path} is damaged ({problem}); start the same command with "
                "--load_best_at_end false to save the model of the last step"
            )
        return read_state(path)

    load_checkpoint(engine, world, path, world.on_main("verify best checkpoint", verify))
    if world.is_main:
        logger.info("the best model is from step %d, with %s %.4f", chosen.step, best.metric, chosen.value)
    return chosen.consumed_samples


def _direction(encoder: TextEncoder, card: EmbeddingCard, is_adapter: bool) -> dict[str, bool]:
    """The config that makes transformers load a decoder as bidirectional; warns the user if there is none."""
    if not isinstance(encoder.attention, BidirectionalAttention):
        return {}
    config = encoder.backbone.config
    direction = None if getattr(config, "auto_map", None) else direction_in_config(config, False)
    if direction is None:
        reason = "transformers can't make its family bidirectional"
    elif "is_causal" not in direction:
        return direction
    elif any(w and w < max(card.query_max_length, card.doc_max_length) for w in encoder.attention.windows.values()):
        reason = "in transformers its sliding window would be one token wider"
    elif is_adapter:
        reason = (
            "an adapter can't record this; ds-embed export --format sentence-transformers writes a folder that does"
        )
    else:
        return direction
    logger.warning(
        "only ds_embed loads the trained model as bidirectional: other libraries treat RUN/model as causal and give "
        "different vectors (%s)",
        reason,
    )
    return {}


def _check_adapter(weights: dict[str, torch.Tensor]) -> None:
    """Check that an adapter is neither empty nor untrained, which is a common bug with ZeRO-3 elsewhere."""
    empty = [name for name, tensor in weights.items() if tensor.numel() == 0]
    assert weights and not empty, f"LoRA weights gathered empty: {empty[:3]}"
    outputs = [tensor for name, tensor in weights.items() if "lora_B" in name]
    assert any(bool(tensor.any()) for tensor in outputs), "every lora_B is still zero after training"
