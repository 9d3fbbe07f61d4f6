"""The kind of model that a config describes: its class, and what running a small copy of it reveals.

Names don't tell whether a token sees later ones: decoders may be bidirectional by their config or their own code, and
encoders causal. So we run a copy with few layers and random weights on two texts.

Shapes: S tokens, D dimensions.
"""

import contextlib
import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ds_embed.settings.errors import UserError

# Names of the table of learned positions in transformers' models.
_POSITION_TABLES = ("position_embeddings", "embed_positions", "wpe")
# Encoder-decoder models whose encoder is a separate model in transformers.
_ENCODERS = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}
DPR = ["DPREncoder"]  # architectures in the config of its BERT until that is saved
SAME_STATE = 1e-4  # largest relative difference at which two states of a token count as equal


@dataclass(frozen=True)
class Kind:
    """What a trial run reveals."""

    is_causal: bool  # no token sees later ones
    num_dims: int  # D, of a token's state
    longest: int | None  # number of learned positions; None if positions are computed (rotary)


_KINDS: dict[tuple[type, str, bool], Kind] = {}  # trial results of this process


def kind_of(config: Any, trust_remote_code: bool, name: str = "the model") -> Kind:
    """Try out the model of a transformers config, once per process. UserError naming it if it is not a text encoder."""
    key = type(config), config.to_json_string(), trust_remote_code
    if key not in _KINDS:
        _KINDS[key] = _try(config, backbone_class(config, trust_remote_code, name), name)
    return _KINDS[key]


def direction_in_config(config: Any, trust_remote_code: bool) -> dict[str, bool] | None:
    """The setting in config.json that makes a causal decoder bidirectional in transformers; None if there is none."""
    by_flag = hasattr(config, "use_bidirectional_attention")
    direction = {"use_bidirectional_attention": True} if by_flag else {"is_causal": False}
    changed = copy.deepcopy(config)
    changed.update(direction)
    return None if kind_of(changed, trust_remote_code).is_causal else direction


def is_bert_style(config: Any) -> bool:
    """Whether a non-causal model is of a type trained as an encoder from the start: BERT and its relatives, T5."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES or config.model_type in _ENCODERS


def auto_class(config: Any) -> Any:
    """The class that loads the backbone: AutoModel, or its counterpart for encoders without their decoder."""
    from transformers import AutoModel, AutoModelForTextEncoding

    return AutoModelForTextEncoding if config.model_type in _ENCODERS else AutoModel


def backbone_class(config: Any, trust_remote_code: bool, name: str = "the model") -> type:
    """The class of the bare text encoder or decoder. UserError naming the model if there is none."""
    import transformers
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    own = (getattr(config, "auto_map", None) or {}).get("AutoModel")
    known: Any = transformers.MODEL_MAPPING.get(type(config), None)
    known = known[0] if isinstance(known, tuple) else known
    if own is not None and trust_remote_code:
        return get_class_from_dynamic_module(own, config.name_or_path)
    if own is not None and known is not None and own.split(".")[-1] != known.__name__:
        raise UserError(
            f"{name}: comes with Python code of its own ({own.split('.')[-1]}), which is not run, and transformers would "
            f"take it for a {known.__name__}; read that code, and if you trust it give --trust_remote_code true"
        )
    if config.model_type in _ENCODERS:
        return getattr(transformers, _ENCODERS[config.model_type])
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"--model_name_or_path {name}: encoder-decoder models ({config.model_type}) are not supported; of "
            f"{', '.join(_ENCODERS)} the encoder is"
        )
    if known is None:
        raise UserError(f"--model_name_or_path {name}: transformers has no model for its config ({config.model_type})")
    return known


def make_bidirectional(backbone: Any) -> None:
    """Mark every layer of a decoder as not causal, in place: some kernels only check the layer."""
    for module in backbone.modules():
        if getattr(module, "is_causal", False):
            module.is_causal = False


def probe_texts(config: Any) -> Tensor:
    """Token ids (2, S) of two texts that differ only in their last token, without padding."""
    pad = getattr(config.get_text_config(), "pad_token_id", None)
    one, other = [number for number in range(3) if number != pad][:2]
    return torch.tensor([[one, one, one, one], [one, one, one, other]])


def sees_behind(states: Tensor) -> bool | None:
    """Whether states (2, S, D) of the probe texts differ in a token before the last; None if they are not finite."""
    one, other = states[:, :-1].float()
    if not torch.isfinite(states).all():
        return None
    return bool(((one - other).norm(dim=1) > SAME_STATE * one.norm(dim=1)).any())


@contextlib.contextmanager
def blaming_files(
    name: str, flag: str = "model_name_or_path", what: str = "its config.json can't be used"
) -> Iterator[None]:
    """UserError naming the model when transformers, which alone is called in it, can make nothing of a model's files."""
    try:
        yield
    except Exception as error:  # tokenizers raises just this
        if isinstance(error, UserError | MemoryError) or "trust_remote_code" in str(error):
            raise
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"--{flag} {name}: {what}: {reason} ({type(error).__name__}); bring back the file") from None


def _try(config: Any, model_class: type, name: str) -> Kind:
    # On the CPU even while a model is being built on the meta device: a trial needs values.
    with blaming_files(name), torch.no_grad(), torch.device("cpu"):
        model = _small_copy(config, model_class)
        try:
            texts = probe_texts(config)
            states = model(input_ids=texts, attention_mask=torch.ones_like(texts)).last_hidden_state
        except (TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"--model_name_or_path {name}: a {config.model_type} makes no states of tokens from their ids alone "
                f"({str(error).splitlines()[0]}); it is no text encoder"
            ) from error
    return Kind(not sees_behind(states), states.shape[2], count_positions(model))


def _small_copy(config: Any, model_class: type) -> nn.Module:
    """The model with few layers, at least one of each type, in float32 on the CPU, with weights of little memory.

    Each weight matrix is an overlapping view of a short vector of noise, so its rows differ but few numbers are stored.
    """
    from accelerate import init_empty_weights

    config = copy.deepcopy(config)
    text = config.get_text_config()
    types = getattr(text, "layer_types", None) or []
    needed = max([1, *(types.index(kind) + 1 for kind in set(types))])
    if needed < (getattr(text, "num_hidden_layers", None) or 0):
        with contextlib.suppress(AttributeError, NotImplementedError):  # some configs compute it
            text.num_hidden_layers = needed
            if types:
                text.layer_types = types[:needed]
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), init_empty_weights(include_buffers=False):
        model: Any = model_class(config, **without_pooler(config))
    if getattr(config, "is_causal", True) is False:
        make_bidirectional(model)
    noise = torch.Generator().manual_seed(0)
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[key] = nn.Parameter(_made_up(parameter.shape, noise), requires_grad=False)
    return model.eval()


def _made_up(shape: torch.Size, noise: torch.Generator) -> Tensor:
    if len(shape) < 2:  # norms and biases
        return 1 + torch.randn(shape, generator=noise) / 10
    # Of more than two dimensions are experts, and XLNet's matrices, whose norms would undo what is equal along the first.
    strides = (1, 1) if len(shape) == 2 else (1, *torch.empty(shape[1:], device="meta").stride())
    size = 1 + sum((length - 1) * stride for length, stride in zip(shape, strides))
    return (torch.randn(size, generator=noise) * shape[-1] ** -0.5).as_strided(shape, strides)


def count_positions(model: nn.Module) -> int | None:
    """The number of tokens that a model has learned positions for; None if positions are computed (rotary).

    RoBERTa and its relatives start counting after the padding index, so a table of 514 allows 512 tokens.
    """
    limits = [
        module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and name.split(".")[-1] in _POSITION_TABLES
    ]
    return min([*limits, getattr(model.config, "max_position_embeddings", limits[0])]) if limits else None


def plain_config(config: Any, name: str) -> Any:
    """The config itself or, for DPR's two encoders, which wrap a BERT, that BERT's config.

    UserError for multimodal models and for weights that are already quantized.
    """
    from transformers import BertConfig

    quantized = getattr(config, "quantization_config", None) or getattr(config, "compression_config", None)
    if quantized:
        method = quantized.get("quant_method", "of an unnamed method")
        raise UserError(
            f"--model_name_or_path {name}: its weights are quantized already ({method}), which is not supported; give the "
            "model that they were made from, with --load_in_4bit nf4 to hold it in 4 bits (and an adapter as --adapter_path)"
        )

    if config.get_text_config() is not config and not getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"--model_name_or_path {name}: a {config.model_type} has a text model among others; save that alone, as "
            "transformers.AutoModel.from_pretrained(NAME).language_model.save_pretrained(FOLDER), and its tokenizer"
        )
    if config.model_type != "dpr":
        return config
    if config.projection_dim:
        raise UserError(f"--model_name_or_path {name}: is a DPR encoder with a projection, which is not supported")
    fields = {key: value for key, value in config.to_dict().items() if key not in ("model_type", "projection_dim")}
    plain = BertConfig(**fields | {"architectures": DPR})
    plain._commit_hash = getattr(config, "_commit_hash", None)
    return plain


def loading_options(config: Any) -> dict[str, Any]:
    """Options of from_pretrained for loading weights: no pooler, and DPR's names for its BERT's weights."""
    names = {r"^(question_encoder|ctx_encoder)\.bert_model\.": ""}
    return ({"key_mapping": names} if config.model_type == "bert" else {}) | without_pooler(config)


def without_pooler(config: Any) -> dict[str, Any]:
    """Options that keep a class from building a pooler: BERT's would be trained without ever being used."""
    from transformers import MODEL_MAPPING

    model_class: Any = MODEL_MAPPING.get(type(config), None)
    model_class = model_class[0] if isinstance(model_class, tuple) else model_class  # Funnel's
    takes = () if model_class is None else inspect.signature(model_class).parameters
    return {"add_pooling_layer": False} if "add_pooling_layer" in takes else {}
