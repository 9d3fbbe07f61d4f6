"""LoRA adapters in PEFT folders: everything in one is applied to the bare model, or refused by name.

An adapter may have been trained on a model with a head (AutoModelForCausalLM, ...ForSequenceClassification). Its names
then have that model's prefix, which the bare model lacks, and it may contain matrices of the head, which do not affect
vectors; these are omitted, and their names logged.
"""

import json
import logging
import re
import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_embed.settings import LoraArguments
from ds_embed.settings.errors import UserError

_MUTATING = ("pissa", "olora", "corda", "loftq", "lora_ga")
_FAULTS = (ValueError, TypeError, LookupError, AttributeError, RuntimeError)  # of PEFT, about what it is given
_PREFIX = "base_model.model."  # PEFT's prefix of module names

logger = logging.getLogger(__name__)


def read_adapter(folder: Path) -> Any:
    """The LoraConfig of a PEFT folder. UserError if it is of another type, or has settings unknown to this PEFT."""
    from peft import LoraConfig

    path = folder / "adapter_config.json"
    try:
        content = json.loads(path.read_text("utf-8"))
        kind = content.get("peft_type")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path}: can't be read as JSON ({error})") from None
    if kind != "LORA":
        raise UserError(f"{path}: peft_type {kind}: only LoRA adapters can be loaded; merge it into its base with PEFT")
    for name in ("megatron_config", "alora_invocation_tokens"):  # PEFT would import the module named by the first
        if content.get(name) is not None:
            raise UserError(f"{path}: has {name}; such adapters are not supported")
    known = {field.name for field in fields(LoraConfig)}
    unknown = sorted(name for name, value in content.items() if name not in known and value)
    if unknown:
        raise UserError(
            f"{path}: {unknown[0]} is unknown to the installed PEFT, which would ignore it; install the PEFT that wrote "
            "the adapter, or remove the key if it changes nothing"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about unknown keys without a value
        try:
            return LoraConfig.from_pretrained(str(folder))
        except _FAULTS as error:
            raise UserError(f"{path}: can't be used: {' '.join(str(error).split())}") from None


def changes_base(config: Any) -> bool:
    """Whether initializing the matrices of this LoraConfig changes the base model's weights."""
    return str(config.init_lora_weights).startswith(_MUTATING)


def put_adapter_on(backbone: torch.nn.Module, folder: Path, trained: LoraArguments | None = None) -> Any:
    """The backbone wrapped by PEFT, with the LoRA matrices of `folder`: frozen, or trainable with settings `trained`.

    UserError naming the adapter and the weight if one is missing, superfluous or of another shape.
    """
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    config = read_adapter(folder)
    weights = _on_bare_model(backbone, config, _read_weights(folder), folder)
    weights = _without_table(backbone, config, weights, folder)
    if config.use_dora and any(hasattr(parameter, "ds_id") for parameter in backbone.parameters()):
        raise UserError(
            f"{folder}: a DoRA reads weights outside of their layer, where ZeRO-3 has let go of them; take a --deepspeed "
            "of ZeRO 0 to 2, or the merged model of ds-embed export"
        )
    config.inference_mode = trained is None
    if trained is not None:
        config.lora_dropout = trained.lora_dropout
    with warnings.catch_warnings():
        # About a call from PEFT to transformers, and about a base name that differs from the one used in training.
        warnings.simplefilter("ignore")
        try:
            model = get_peft_model(backbone, config, autocast_adapter_dtype=False)
        except _FAULTS as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{folder}: this adapter does not fit {backbone.name_or_path}: {reason}") from None
    wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
    shapes = {name: tuple(getattr(tensor, "ds_shape", tensor.shape)) for name, tensor in wanted.items()}
    odd = sorted(n for n in weights.keys() | shapes.keys() if n not in weights or shapes.get(n) != weights[n].shape)
    if odd:
        name, found = odd[0], weights.get(odd[0])
        raise UserError(
            f"{folder}: this adapter does not fit {backbone.name_or_path}: {len(odd)} weight(s), such as {name}: the "
            f"adapter has {'none' if found is None else tuple(found.shape)}, the model with its adapter_config.json "
            f"{shapes.get(name, 'none')}; give the base model that it was trained on"
        )
    set_peft_model_state_dict(model, weights)
    return model


def _read_weights(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    safe, pickled = folder / "adapter_model.safetensors", folder / "adapter_model.bin"
    if not safe.exists() and not pickled.exists():
        raise UserError(f"{folder}: has adapter_config.json and neither {safe.name} nor {pickled.name}")
    weights = load_file(safe) if safe.exists() else torch.load(pickled, map_location="cpu", weights_only=True)
    # State dicts from custom training loops still have the adapter's name in their keys.
    return {re.sub(r"(\.lora_[A-Za-z_]+)\.[^.]+(\.weight|\.bias)$", r"\1\2", name): w for name, w in weights.items()}


def _on_bare_model(backbone: Any, config: Any, weights: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """The weights under the bare model's names; `config` is changed accordingly."""
    config.task_type = "FEATURE_EXTRACTION"
    config.auto_mapping = None
    config.base_model_name_or_path = backbone.name_or_path
    head_prefix = getattr(backbone, "base_model_prefix", "") + "."
    if getattr(backbone, "pooler", None) is None:  # no vector depends on BERT's, which sentence-transformers trains too
        inside = {name: name.removeprefix(_PREFIX).removeprefix(head_prefix) for name in weights}
        weights = {name: weight for name, weight in weights.items() if not inside[name].startswith("pooler.")}
        config.modules_to_save = [name for name in config.modules_to_save or () if name != "pooler"] or None
    has_head = head_prefix != "." and not hasattr(backbone, head_prefix[:-1])
    has_head = has_head and any(name.startswith(_PREFIX + head_prefix) for name in weights)
    if not has_head and not isinstance(config.target_modules, str):
        return weights
    kept: dict[str, Tensor] = {}
    places: dict[str, str] = {}  # from a module's name in training to its name here
    left_out: set[str] = set()
    for name, weight in weights.items():
        inner = name.removeprefix(_PREFIX)
        bare = inner.removeprefix(head_prefix)
        if has_head and bare == inner:
            left_out.add(inner.split(".")[0])
            continue
        kept[_PREFIX + bare] = weight
        if ".lora_" in inner:
            places[inner.split(".lora_")[0]] = bare.split(".lora_")[0]
    if left_out:
        logger.info("%s: left out %s, which no vector depends on", folder, ", ".join(sorted(left_out)))
    _name_places(config, places)
    modules = [f".{module}" for module, _ in backbone.named_modules()]

    def here(given: Iterable[str]) -> dict[str, str]:
        """Those of the modules that the bare model has, by their names in training."""
        bare = {name: name.removeprefix(head_prefix) for name in given}
        return {old: new for old, new in bare.items() if any(module.endswith(f".{new}") for module in modules)}

    config.modules_to_save = [*here(config.modules_to_save or ()).values()] or None
    tokens = config.trainable_token_indices
    if isinstance(tokens, dict):
        config.trainable_token_indices = {new: tokens[old] for old, new in here(tokens).items()} or None
    return kept


def _without_table(backbone: Any, config: Any, weights: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """The weights without the base's own embedding table, which PEFT saves too where LoRA is put on it.

    UserError if it is another: PEFT saves the table of an enlarged vocabulary in the same place.
    """
    own = backbone.get_input_embeddings()
    place = _PREFIX + next(name for name, module in backbone.named_modules() if module is own)
    is_trained = any(place.endswith(f".{name}") for name in config.modules_to_save or ())
    kept, shape = dict(weights), tuple(getattr(own.weight, "ds_shape", own.weight.shape))
    for name in (f"{place}.weight", f"{place}.base_layer.weight"):
        table, reason = weights.get(name), None
        if table is None:
            continue
        if len(table) != shape[0]:
            reason = (
                f"an embedding table of {len(table)} tokens, as its vocabulary was changed, and the base has {shape[0]}"
            )
        elif not is_trained:
            del kept[name]
            with _whole(own.weight):
                known = own.weight.data
                low = min(known.dtype, table.dtype, key=lambda dtype: dtype.itemsize)  # one of both was rounded
                if known.device.type != "meta" and not torch.equal(known.cpu().to(low), table.to(low)):
                    reason = "an embedding table with other numbers than the base's"
        if reason is not None:
            raise UserError(
                f"{folder}: this adapter for {backbone.name_or_path} brings {reason}, which can't be applied here; merge it "
                "with PEFT (resize_token_embeddings of the base, PeftModel.from_pretrained, merge_and_unload, save_pretrained)"
            )
    return kept


def _whole(parameter: Any) -> AbstractContextManager:
    """Within it, a parameter that ZeRO-3 has shared out is whole on every rank; all must enter it."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    from deepspeed import zero

    return zero.GatheredParameters([parameter])


def _name_places(config: Any, places: dict[str, str]) -> None:
    """List the modules with matrices one by one, since the patterns may match only names of the model with a head."""
    from peft.utils.other import get_pattern_key

    for pattern, default in (("rank_pattern", config.r), ("alpha_pattern", config.lora_alpha)):
        old = getattr(config, pattern)
        values = {new: old.get(get_pattern_key(old.keys(), name), default) for name, new in places.items()}
        # PEFT interprets these keys as regular expressions, where "^" matches the start of the module's name.
        setattr(config, pattern, {f"^{re.escape(new)}": v for new, v in values.items() if v != default})
    config.target_modules = set(places.values())
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
