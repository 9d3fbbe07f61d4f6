"""Backbones and tokenizers from folders or hub names: base model, adapter on a base, or a finished run."""

import contextlib
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ds_embed.artifact.artifact import MANIFEST
from ds_embed.artifact.identity import identify_large, identify_model, identify_texts, identify_weights
from ds_embed.data.tokenize import put_into_lower_case
from ds_embed.models.adapters import put_adapter_on, read_adapter
from ds_embed.models.attention import OUR_KERNELS, choose_attention, choose_direction
from ds_embed.models.card import CARD_NAME, EmbeddingCard
from ds_embed.models.checkpoint import STATE, CheckpointReader, checkpoint_in, found_again, read_state, steps_of, verify
from ds_embed.models.cpu import takes_math_kernel, use_kernels
from ds_embed.models.encoder import LOG_SCALE_CHANGE, PROJECTION, TextEncoder, learned_temperature
from ds_embed.models.kinds import (
    DPR,
    auto_class,
    backbone_class,
    blaming_files,
    kind_of,
    loading_options,
    plain_config,
    without_pooler,
)
from ds_embed.models.lora import add_lora
from ds_embed.models.pooling import NORMALIZE, build_head
from ds_embed.models.sentence_transformers import (
    MODULES_NAME,
    ModelFiles,
    OwnFiles,
    head_weights,
    load_head,
    read_own_files,
)
from ds_embed.models.tokenizer import check_vocabulary
from ds_embed.models.varlen import VARLEN_KERNEL, use_varlen
from ds_embed.settings import LoraArguments, ModelArguments, TextArguments
from ds_embed.settings.errors import UserError

ADAPTER_CONFIG = "adapter_config.json"
_BUFFERS = {"position_ids", "token_type_ids", "inv_freq", "masked_bias", "causal_mask"}  # in files of older versions
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


@dataclass(frozen=True)
class ModelSource:
    """Where a model's parts are: `base` weights, an optional PEFT `adapter`, the tokenizer, what it says of itself."""

    base: str
    adapter: Path | None
    tokenizer: str
    card: EmbeddingCard | None
    revision: str | None = None  # of base, where it is a hub name
    own: OwnFiles | None = None  # what its sentence-transformers files say, where there is no card
    files: ModelFiles | None = None  # where the card, or they, and the weights behind the pooling are
    load_in_4bit: str | None = None  # how base's linear layers are to be held
    checkpoint: Path | None = None  # the trained weights, where they are a run's in its middle
    lora: LoraArguments | None = None  # what that run trains
    base_content: str | None = None  # what `base` held when that run was started

    @property
    def is_adapted(self) -> bool:
        """Whether LoRA matrices lie on the base."""
        return self.adapter is not None or (self.lora is not None and bool(self.lora.lora_rank))

    def load_head(self, head: list[dict[str, Any]]) -> torch.nn.Sequential:
        """The modules behind the pooling, as a card has them, with their weights, which a checkpoint brings later."""
        if self.checkpoint is not None:
            return build_head(head)
        return load_head(head, self._files)

    @property
    def _files(self) -> ModelFiles:
        return self.files or ModelFiles(self.base, self.revision)

    @property
    def says(self) -> dict[str, Any]:
        """Settings of a card by name, as the model's own card or files give them."""
        return vars(self.card) if self.card is not None else self.own.settings if self.own is not None else {}

    def identify(self, commit: str | None) -> dict[str, str]:
        """The content of its weights and configs; `commit` is the revision of a base that comes from the hub."""
        if self.checkpoint is not None:
            known = identify_model(self.base, self.adapter, commit)
            changed = "adapter" if self.is_adapted else "base_model"
            return known | {changed: f"checkpoint {identify_texts([self.checkpoint / MANIFEST])}, {known[changed]}"}
        layers = [layer for layer in self.says.get("head", []) if layer["type"] == "Dense"]
        paths = [path for path in (head_weights(layer, self._files) for layer in layers) if path is not None]
        known = identify_model(self.base, self.adapter, commit)
        known["load_in_4bit"] = str(self.load_in_4bit)
        return known | ({"dense_layers": identify_large(paths)} if paths else {})


def find_model(
    model_name_or_path: str,
    adapter_path: str | None = None,
    flag: str = "model_name_or_path",
    revision: str | None = None,
    step: int | None = None,
) -> ModelSource:
    """Resolve a base model, a run, a PEFT or sentence-transformers folder, a hub name, or a base plus an adapter.

    Of a run, `step` takes a checkpoint, which may be given itself too. UserError naming the flag when a folder does
    not exist or holds no model.
    """
    checkpoint = checkpoint_in(flag, model_name_or_path, step)
    if checkpoint is not None:
        if adapter_path is not None:
            raise UserError(f"--adapter_path {adapter_path}: goes on no checkpoint; export that, by ds-embed export")
        return _find_checkpoint(checkpoint, flag)
    files = locate(flag, model_name_or_path, revision)
    if adapter_path is not None:
        adapter = locate("adapter_path", adapter_path, None)
        if adapter.find(ADAPTER_CONFIG) is None:
            raise UserError(f"--adapter_path {adapter_path}: no {ADAPTER_CONFIG} there; give a LoRA run or adapter")
        return _find_adapted(adapter, files)
    if files.find(ADAPTER_CONFIG) is None:
        return _find_whole(files)
    return _find_adapted(files, _find_base(files, flag))


def find_source(model: ModelArguments) -> ModelSource:
    """What find_model finds for these settings, to be loaded as they say."""
    source = find_model(model.model_name_or_path, model.adapter_path, revision=model.model_revision, step=model.step)
    if model.load_in_4bit is not None and source.checkpoint is not None:
        raise UserError(
            f"--load_in_4bit {model.load_in_4bit}: not of a checkpoint; export that first, by ds-embed export --run "
            f"{source.checkpoint}"
        )
    return replace(source, load_in_4bit=model.load_in_4bit)


def check_stage(model: ModelArguments, stage: int) -> None:
    """UserError when the model can't be loaded under this ZeRO stage as the settings say."""
    if model.load_in_4bit is not None and stage == 3:
        raise UserError(
            f"--load_in_4bit {model.load_in_4bit}: ZeRO-3 can't cut 4-bit weights into shares; take a --deepspeed of ZeRO 0 "
            "to 2, such as zero2"
        )


def checkpoint_source(path: Path, flag: str) -> tuple[ModelSource, dict[str, Any]]:
    """What a run trains, and the content of its card, from what it wrote about that beside the weights of a step."""
    verify(path, STATE)
    model = read_state(path).get("model")
    if model is None:
        raise UserError(
            f"--{flag} {path}: an earlier version of ds_embed wrote this checkpoint and not what it was trained from; start "
            "its training command again, which goes on from it"
        )
    places = {name: model[name] and found_again(model[name], path) for name in ("base", "adapter", "tokenizer")}
    source = ModelSource(
        places["base"],
        Path(places["adapter"]) if places["adapter"] else None,
        places["tokenizer"],
        None,
        model["revision"],
        checkpoint=path,
        lora=LoraArguments(**model["lora"]),
        base_content=model["base_content"],
    )
    return source, model["card"]


def _find_checkpoint(path: Path, flag: str) -> ModelSource:
    source, content = checkpoint_source(path, flag)
    card, reader = EmbeddingCard.of(content, path / STATE), CheckpointReader(path)
    if LOG_SCALE_CHANGE in reader.tensors:
        assert card.temperature is not None
        temperature = learned_temperature(card.temperature, reader.read(LOG_SCALE_CHANGE).squeeze())
        card = replace(card, temperature=temperature.item())
    return replace(source, card=card)


def _find_base(adapter: ModelFiles, flag: str) -> ModelFiles:
    """The base model that an adapter names: as it is named, beside the adapter, or where it stood when both were moved."""
    folder, (card, _) = _folder_of(adapter), _said_by(adapter)
    config = read_adapter(folder)
    name = config.base_model_name_or_path
    if not name:
        raise UserError(
            f"--{flag} {adapter.name}: its {ADAPTER_CONFIG} names no base model; give that as --model_name_or_path, and this "
            "as --adapter_path"
        )
    for place in (Path(name).expanduser(), folder / name, folder / (card.base_model if card else name)):
        if any((place / file).exists() for file in ("config.json", MODULES_NAME)):
            return ModelFiles(str(place.resolve()))
    base = locate(
        flag,
        name,
        config.revision,
        hint=f" (the base model that {adapter.name} names; --adapter_path puts it on another)",
    )
    if base.find(ADAPTER_CONFIG) is not None:
        raise UserError(
            f"--{flag} {adapter.name}: its base model {name} is an adapter itself; merge that first, by "
            "ds-embed export --format merged"
        )
    return base


def _find_whole(files: ModelFiles) -> ModelSource:
    card, own = _said_by(files)
    base, revision = files.name, files.revision
    if own is not None and own.transformer:  # as versions 0 and 1 wrote them
        base, revision = files.folder(own.transformer), None
        if not (Path(base) / "config.json").exists():
            raise UserError(f"{files.name}: no config.json in {own.transformer}, where {MODULES_NAME} has it")
    return ModelSource(base, None, base, card, revision, own, files)


def _find_adapted(adapter: ModelFiles, base: ModelFiles) -> ModelSource:
    """An adapter, downloaded where need be, on its base; what the adapter does not say or bring, the base does."""
    folder = _folder_of(adapter)
    # All that there are, so that they are fetched; of the weights one kind, which put_adapter_on looks for.
    adapter.find("adapter_model.safetensors") or adapter.find("adapter_model.bin")
    tokenizer_files = [adapter.find(name) for name in _TOKENIZER_FILES]
    whole = _find_whole(base)
    card, own = _said_by(adapter)
    tokenizer = str(folder) if any(tokenizer_files) else whole.tokenizer
    if card is not None or (own is not None and own.names_modules):
        return replace(whole, adapter=folder, tokenizer=tokenizer, card=card, own=own, files=adapter)
    found = replace(whole, adapter=folder, tokenizer=tokenizer)
    if own is None or not any(own.settings.get(name) for name in ("query_prefix", "doc_prefix", "prompts")):
        return found
    if whole.card is not None:  # the adapter has prompts alone, and the base says the rest
        return replace(found, card=replace(whole.card, **own.settings))
    return replace(
        found, own=own if whole.own is None else replace(whole.own, settings=whole.own.settings | own.settings)
    )


def _folder_of(adapter: ModelFiles) -> Path:
    config = adapter.find(ADAPTER_CONFIG)
    assert config is not None
    return config.parent


def _said_by(files: ModelFiles) -> tuple[EmbeddingCard | None, OwnFiles | None]:
    """The model's card or, where it has none, what its sentence-transformers files say."""
    path = files.find(CARD_NAME)
    return (None, read_own_files(files)) if path is None else (EmbeddingCard.read(path), None)


def locate(flag: str, name: str, revision: str | None, hint: str = "") -> ModelFiles:
    """The folder with the model's files, or the hub repository of that name."""
    path, reason = Path(name).expanduser(), None
    for folder in (path, path / "model"):
        if any((folder / file).exists() for file in (ADAPTER_CONFIG, "config.json", MODULES_NAME)):
            return ModelFiles(str(folder.resolve()))
    if (path / "config.yaml").exists():
        reason = f"a run that has not finished: no model/ in it; {steps_of(path)}"
    elif path.is_dir():
        reason = "no config.json in this folder"
    elif path.exists():
        reason = "is a file; give the folder that holds config.json"
    elif path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        reason = "no such folder"
    if reason is not None:
        raise UserError(f"--{flag} {name}{hint}: {reason}")
    return ModelFiles(name, revision)


def load_config(source: ModelSource, trust_remote_code: bool) -> Any:
    """The transformers config of the base model. UserError when it is not one we can embed with."""
    from transformers import AutoConfig

    where = {"revision": source.revision, "trust_remote_code": trust_remote_code}
    with without_foreign_code(source.base), blaming_files(source.base):
        try:
            config = AutoConfig.from_pretrained(source.base, **where)
        except OSError as error:
            if Path(source.base).is_dir():
                raise ValueError(error) from None
            why = f"neither a folder here nor a model that could be fetched: {str(error).strip().splitlines()[0]}"
            raise UserError(f"--model_name_or_path {source.base}: {why}") from None
        config = plain_config(config, source.base)
        config.return_dict = True  # which names a model's outputs; some files hold false
        backbone_class(config, trust_remote_code, source.base)  # or says why there is none
    return config


def choose_card(source: ModelSource, text: TextArguments, model: ModelArguments) -> EmbeddingCard:
    """How texts become vectors: flags, else the model's own card or files, else our defaults for its kind.

    UserError when a length exceeds what the model has positions for, or its attention can't be as asked.
    """
    config = load_config(source, model.trust_remote_code)
    kind = kind_of(config, model.trust_remote_code, source.base)
    asked = model.bidirectional
    if asked is None and kind.is_causal:
        asked = source.says.get("bidirectional")
    choose_direction(config, kind, asked, source.base)
    own: dict[str, Any] = {"pooling": "cls"} if config.architectures == DPR else {}
    if source.own is not None and source.own.names_modules:  # sentence-transformers takes these for limits
        limits = source.own.tokenizer_length, getattr(config, "max_position_embeddings", None)
        length = min((limit for limit in limits if limit is not None and limit > 0), default=None)  # XLNet's is -1
        own |= {"query_max_length": length, "doc_max_length": length}
    own |= source.own.settings if source.own else {}
    card = EmbeddingCard.choose(text, model, kind, source.base, source.card, own)
    card.dimensions(kind.num_dims)  # or says which parts don't fit, before anything is read or tokenized
    return card


def load_tokenizer(source: ModelSource, trust_remote_code: bool) -> Any:
    """The fast tokenizer that belongs to the model."""
    from transformers import AutoTokenizer

    where = {"revision": None if Path(source.tokenizer).is_dir() else source.revision}
    with (
        without_foreign_code(source.tokenizer),
        blaming_files(source.tokenizer, what="its tokenizer can't be loaded; is its tokenizer.json there?"),
    ):
        tokenizer = AutoTokenizer.from_pretrained(source.tokenizer, trust_remote_code=trust_remote_code, **where)
    check_vocabulary(tokenizer, "model_name_or_path", source.tokenizer)
    if not tokenizer.is_fast:
        raise UserError(f"--model_name_or_path {source.tokenizer}: has no fast tokenizer (tokenizer.json); convert it")
    if source.says.get("lower_case"):
        put_into_lower_case(tokenizer)
    return tokenizer


def load_encoder(
    source: ModelSource,
    *,
    pooling: str,
    bidirectional: bool,
    bf16: bool,
    attn_implementation: str | None = None,
    trust_remote_code: bool,
    trained: LoraArguments | None = None,
    head: list[dict[str, Any]] | None = None,
) -> TextEncoder:
    """The encoder with its base weights, and the adapter where the source has one.

    bidirectional: whether a decoder's tokens see the whole text; encoders' always do.
    head: the modules behind the pooling as a card has them; default L2 normalisation.
    trained: how the adapter is to be trained further; it is frozen if None.
    Under an active ZeRO-3 HfDeepSpeedConfig transformers partitions the weights while loading.
    """
    config = load_config(source, trust_remote_code)
    kind = kind_of(config, trust_remote_code, source.base)  # before the config is told of a kernel
    options = _model_options(config, bf16, attn_implementation, trust_remote_code)
    if source.load_in_4bit is not None:
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=source.load_in_4bit, bnb_4bit_compute_dtype=options["dtype"]
        )
    with without_foreign_code(source.base, attn_implementation), without_reports():
        where = {"revision": source.revision, "config": config}
        backbone = auto_class(config).from_pretrained(source.base, **where, **options, **loading_options(config))
    if config.model_type == "bert":
        backbone._weight_conversions = []  # names that only reading needs: under ZeRO-3 saving would turn them back
    for module in backbone.modules():
        # On a CPU with such instructions bitsandbytes packs weights in the first pass without gradients, be it one of
        # validation, and from then on its layers pass no gradient on.
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
    attention = choose_attention(backbone, kind, bidirectional)
    if source.adapter is not None:
        with without_foreign_code(str(source.adapter)):
            backbone = put_adapter_on(backbone, source.adapter, source.lora or trained)
        for parameter in backbone.parameters():  # buffers, such as rotary frequencies, stay as exact as they are
            if parameter.is_floating_point():  # and not 4-bit numbers, two to a byte
                parameter.data = parameter.data.to(options["dtype"])
    layers = source.load_head([NORMALIZE] if head is None else head).to(options["dtype"])
    encoder = TextEncoder(backbone, pooling, attention, head=layers)
    if source.checkpoint is not None:
        assert source.lora is not None
        if source.lora.lora_rank and source.adapter is None:
            add_lora(encoder, source.lora, seed=0, dtype=options["dtype"])
        put_checkpoint_in(encoder, source)
    return encoder


def check_weights(name: str, model: Any, report: dict[str, Any]) -> None:
    """UserError where transformers would make up, or leave out, weights of the model or of the one inside a classifier.

    report: what from_pretrained has to say of them, sizes that don't match included.
    """
    inner, parts = f"{model.base_model_prefix}.", [part for part, _ in model.named_parameters()]
    is_needed = [n for n in report["missing_keys"] if n.startswith(inner) or not hasattr(model, inner[:-1])]
    missing = sorted(part for part in is_needed if "pooler" not in part)  # no token's state depends on those
    belongs = "bring the files that belong together"
    if missing:
        raise UserError(
            f"{name}: its weight files lack {missing[0]} ({len(missing)} of the {len(parts)} tensors that its config.json "
            f"asks for); nothing is made up in their place: {belongs}"
        )
    for part, *shapes in sorted(report["mismatched_keys"]):
        stored, wanted = (" x ".join(map(str, shape)) for shape in shapes)
        raise UserError(f"{name}: {part} is {stored} in its weight files and {wanted} by its config.json; {belongs}")
    modules = {module.removeprefix(inner): owner for module, owner in model.named_modules()}
    for part in sorted(report["unexpected_keys"]):
        *path, last = part.removeprefix(inner).split(".")
        if (
            "pooler" in part
            or last in _BUFFERS
            or (last == "bias" and not hasattr(modules.get(".".join(path)), "weight"))
        ):
            continue  # GPT-2 and its kin stored their causal mask as attn.bias
        if any(".".join(path[:end]) in modules for end in range(1, len(path) + 1)):  # not a head, which stands beside
            raise UserError(f"{name}: its weight files hold {part}, which its config.json has no place for; {belongs}")


def put_checkpoint_in(module: torch.nn.Module, source: ModelSource) -> None:
    """The weights that the run trains as they were, all of them, each with the shape that the model has."""
    assert source.checkpoint is not None
    reader = CheckpointReader(source.checkpoint)
    weights = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    for name in {LOG_SCALE_CHANGE, PROJECTION} & reader.tensors.keys():  # no vector depends on them
        shapes[name] = tuple(reader.tensors[name].get_slice(name).get_shape())
    reader.check(shapes, f"bring back the base model that it was trained from, {source.base}")
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(reader.read(name))


def check_checkpoint(source: ModelSource, commit: str | None) -> None:
    """UserError when the weights of a checkpoint, or the base that they belong to, are not as they were."""
    assert source.checkpoint is not None
    verify(source.checkpoint, "weights-")
    now = identify_weights(source.base, commit)
    if now != source.base_content:
        raise UserError(
            f"{source.checkpoint}: belongs to {source.base} as it was when the run began: {source.base_content}; now it is "
            f"{now}; bring that back"
        )


def build_encoder(
    config: Any,
    *,
    pooling: str,
    bidirectional: bool,
    bf16: bool,
    attn_implementation: str | None,
    trust_remote_code: bool,
    head: list[dict[str, Any]] | None = None,
) -> TextEncoder:
    """The encoder of a transformers config, with weights that were never loaded: for a count of what it takes."""
    kind = kind_of(config, trust_remote_code)
    options = _model_options(config, bf16, attn_implementation, trust_remote_code)
    with without_foreign_code(config.name_or_path, attn_implementation):
        backbone = auto_class(config).from_config(config, **options, **without_pooler(config))
    attention = choose_attention(backbone, kind, bidirectional)
    layers = build_head([NORMALIZE] if head is None else head).to(options["dtype"])
    return TextEncoder(backbone, pooling, attention, check_attention=False, head=layers)


def _model_options(config: Any, bf16: bool, attn_implementation: str | None, trust_remote_code: bool) -> dict[str, Any]:
    """What AutoModel is told about every backbone, which may name one of our kernels."""
    use_kernels()
    if attn_implementation in OUR_KERNELS and not takes_math_kernel(config):
        raise UserError(f"--attn_implementation {attn_implementation}: not for a {config.model_type}; leave it out")
    if attn_implementation == VARLEN_KERNEL:
        use_varlen(config)
    dtype = torch.bfloat16 if bf16 else torch.float32
    return {"dtype": dtype, "attn_implementation": attn_implementation, "trust_remote_code": trust_remote_code}


@contextlib.contextmanager
def without_reports() -> Iterator[None]:
    """transformers draws no bars and tells of nothing but errors: the caller says what there is to say."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


@contextlib.contextmanager
def without_foreign_code(name: str, attn_implementation: str | None = None) -> Iterator[None]:
    """UserError naming the model when a file is missing, its weights are no plain tensors, or code of its own would run.

    A complaint of the model about the attention kernel that was asked for names the flag.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (pickle.UnpicklingError, EOFError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{name}: its weights can't be read as plain tensors, and nothing else of them is run ({reason}); "
            "bring back the file, best as .safetensors"
        ) from None
    except OSError as error:
        raise UserError(f"{name}: {str(error).strip().splitlines()[0]}") from None
    except (ImportError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{name}: comes with Python code of its own, which is not run; read it, and if you trust it give "
                "--trust_remote_code true"
            ) from None
        if attn_implementation in (None, VARLEN_KERNEL, *OUR_KERNELS):
            raise
        raise UserError(f"--attn_implementation {attn_implementation}: {error}") from None
