"""Reads and writes model folders and hub repositories in the format of sentence-transformers, versions 0 to 6.

What these files say about vectors becomes the settings of a card. modules.json names Python classes, none of which is
imported: known names are interpreted, and all others refused.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ds_embed.models.card import EmbeddingCard
from ds_embed.models.pooling import ACTIVATIONS, NORMALIZE, build_head
from ds_embed.settings.data_arguments import TEXT_PLACE
from ds_embed.settings.errors import UserError

MODULES_NAME = "modules.json"
_PROMPTS_NAME = "config_sentence_transformers.json"
# In the order of concatenation, with their names in versions 5 and 6 and their flags in earlier versions.
_POOLINGS = {
    "cls": ("cls", "pooling_mode_cls_token"),
    "max": ("max", "pooling_mode_max_tokens"),
    "mean": ("mean", "pooling_mode_mean_tokens"),
    "mean_sqrt_len": ("mean_sqrt_len_tokens", "pooling_mode_mean_sqrt_len_tokens"),
    "weighted_mean": ("weightedmean", "pooling_mode_weightedmean_tokens"),
    "last": ("lasttoken", "pooling_mode_lasttoken"),
}
_BACKBONES = {"Transformer", "BERT", "RoBERTa", "DistilBERT", "ALBERT", "CamemBERT", "XLMRoBERTa", "XLNet", "T5"}
_KINDS = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")  # in early file names
# Arguments to transformers that do not affect vectors. Kernel and precision are chosen by our flags.
_HARMLESS = {
    "model": {"add_pooling_layer", "attn_implementation", "dtype", "low_cpu_mem_usage", "torch_dtype", "device_map"},
    "tokenizer": {"padding_side", "use_fast", "model_max_length"},
    "config": {"use_cache"},
}
# sentence-transformers knows these by name, since their files do not say so.
_WITHOUT_PROMPT = ("hkunlp/instructor-base", "hkunlp/instructor-large", "hkunlp/instructor-xl")
# Known keys: those that do not affect vectors, and those that are read or checked where they are read.
_KNOWN = {
    "Pooling": {"word_embedding_dimension", "embedding_dimension", "pooling_mode", "include_prompt"}
    | {flag for _, flag in _POOLINGS.values()},
    "Dense": {"in_features", "out_features", "bias", "activation_function", "use_residual"}
    | {"module_input_name", "module_output_name"},
    "Transformer": {"max_seq_length", "query_length", "document_length", "do_lower_case", "transformer_task"}
    | {"module_output_name", "processing_kwargs", "query_expansion", "modality_config", "unpad_inputs"}
    | {f"{what}_{end}" for what in (*_HARMLESS, "processor") for end in ("args", "kwargs")},
}
_TYPES: dict[str, tuple[type, ...]] = {  # of what these files say
    **dict.fromkeys(("max_seq_length", "query_length", "document_length", "in_features", "out_features"), (int,)),
    **dict.fromkeys(("do_lower_case", "include_prompt", "bias", "use_residual"), (bool,)),
    **{f"{what}_{end}": (dict,) for what in (*_HARMLESS, "processor") for end in ("args", "kwargs")},
    "model_max_length": (int, float),
    "modality_config": (dict,),
}
_IN_ORDER = ("Identity", "Sigmoid", "Tanh", "Softsign", "LogSigmoid", "Softplus")  # activations that keep the order
_UNLIMITED = 10**9  # tokens; a tokenizer without a limit has 10^30


@dataclass(frozen=True)
class ModelFiles:
    """The files of a folder, or of a hub repository at a revision (default main), looked up like in from_pretrained."""

    name: str
    revision: str | None = None

    def find(self, path: str) -> Path | None:
        """The local path of a file, downloaded if necessary; None if it does not exist.

        UserError if the hub can't be reached to find out. Offline, a file that is not cached counts as missing.
        """
        from huggingface_hub import constants, errors, hf_hub_download, try_to_load_from_cache

        if Path(self.name).is_dir():
            found = Path(self.name) / path
            return found if found.is_file() else None
        try:
            return Path(hf_hub_download(self.name, path, revision=self.revision))
        except errors.LocalEntryNotFoundError as error:
            known = try_to_load_from_cache(self.name, path, revision=self.revision)  # that it does not exist
            if constants.HF_HUB_OFFLINE or known is not None:
                return None
            reason = str(error.__cause__ or error).strip().splitlines()[0]
            raise UserError(
                f"{self.name}: no folder here, and the hub can't be reached to see whether the model has {path} ({reason}); "
                "mend the connection, or set HF_HUB_OFFLINE=1 to do with the files that are cached"
            ) from None
        except (errors.HfHubHTTPError, errors.HFValidationError):
            return None  # no such file; or no such repository, or no access to it: loading its config reports that
        except OSError as error:
            raise UserError(f"{self.name}: {path} can't be fetched into the cache: {error}") from None

    def read(self, path: str, kind: type = dict) -> Any:
        """The content of a JSON file, or None if it does not exist. UserError if it is not JSON, or of another type."""
        found = self.find(path)
        try:
            content: Any = None if found is None else json.loads(found.read_text("utf-8"))
        except ValueError as error:
            raise UserError(f"{found}: is not JSON ({error}); bring back the file") from None
        parts = content if isinstance(content, list) else [content]
        if content is not None and not (isinstance(content, kind) and all(isinstance(part, dict) for part in parts)):
            raise UserError(f"{found}: is not in the form of sentence-transformers; bring back the file")
        return content

    def folder(self, path: str) -> str:
        """A local folder with all files of a subfolder."""
        if Path(self.name).is_dir():
            return str(Path(self.name) / path)
        from huggingface_hub import snapshot_download

        return str(Path(snapshot_download(self.name, revision=self.revision, allow_patterns=f"{path}/*")) / path)


@dataclass(frozen=True)
class OwnFiles:
    """What a model's own files say: settings for its card by name, and the location of its transformers model."""

    settings: dict[str, Any]
    names_modules: bool = False  # False if there are only prompts
    transformer: str = ""  # subfolder
    tokenizer_length: int | None = None  # tokens; the length if no setting gives one


def read_own_files(files: ModelFiles) -> OwnFiles | None:
    """The content of a model's sentence-transformers files; None if there are none.

    UserError naming the file and the module, setting or value that can't be applied here.
    """
    modules, general = files.read(MODULES_NAME, list), files.read(_PROMPTS_NAME)
    if modules is None and general is None:
        return None
    general = general or {}
    where = f"{files.name}: {_PROMPTS_NAME}"
    if general.get("model_type", "SentenceTransformer") != "SentenceTransformer":
        raise UserError(f"{where}: is a {general['model_type']}, and only SentenceTransformer models are taken")
    if general.get("truncate_dim") is not None:
        raise UserError(f"{where}: truncate_dim {general['truncate_dim']} can't be applied; take it out of the file")
    settings = _prompts(general, where)
    if general.get("similarity_fn_name") is not None:
        settings["similarity"] = general["similarity_fn_name"]
    if modules is None:
        return OwnFiles(settings)
    kinds, paths = [_kind(files, module) for module in modules], [module.get("path") or "" for module in modules]
    if kinds[:2] != ["Transformer", "Pooling"] or not set(kinds[2:]) <= {"Dense", "Normalize"}:
        raise UserError(
            f"{files.name}: {MODULES_NAME} has the modules {', '.join(kinds)}; taken are Transformer, Pooling, and behind "
            "them any number of Dense and Normalize"
        )
    pooling = _Content(files, paths[1], "Pooling")
    settings |= {"pooling": _pooling(pooling), "include_prompt": pooling.get("include_prompt", True)}
    if files.name in _WITHOUT_PROMPT:
        settings["include_prompt"] = False
    behind = zip(kinds[2:], paths[2:])
    settings["head"] = [_dense(_Content(files, at, kind)) if kind == "Dense" else NORMALIZE for kind, at in behind]
    # Like sentence-transformers: white space is kept, and only the tokenizer adds tokens after a text.
    settings |= {"append_eos": False, "strip": False}
    length = _transformer(files, paths[0], settings)
    del settings["modalities"]
    return OwnFiles({n: value for n, value in settings.items() if value is not None}, True, paths[0], length)


@dataclass(frozen=True)
class PairFiles:
    """What the files of a cross-encoder say beside its model and tokenizer."""

    prompt: str = ""  # in front of a query, or the system's message of a chat
    max_length: int | None = None  # tokens of a pair
    lower_case: bool = False
    activation: str = "Sigmoid"  # behind the logits; none of those that are taken changes the order
    chat: str | None = None  # flat or structured messages for the tokenizer's chat template; None without


def read_pair_files(files: ModelFiles, config: Any, chat_template: Any) -> PairFiles:
    """The content of a cross-encoder's sentence-transformers files, with their meaning in version 6.

    UserError naming the file and the module, setting or value that can't be applied here.
    """
    modules, general = files.read(MODULES_NAME, list), files.read(_PROMPTS_NAME) or {}
    where = f"{files.name}: {_PROMPTS_NAME}"
    if general.get("model_type", "CrossEncoder") != "CrossEncoder":
        raise UserError(f"{where}: is a {general['model_type']}, and only a CrossEncoder scores pairs")
    activation, number = general.get("activation_fn"), getattr(config, "num_labels", 1)
    if activation is None:
        own = getattr(config, "sentence_transformers", None)
        own = own if isinstance(own, dict) else {}
        older = getattr(config, "sbert_ce_default_activation_function", None)
        activation = own.get("activation_fn") or older or f"torch.nn.{'Sigmoid' if number == 1 else 'Identity'}"
    package, *_, name = str(activation).split(".")
    if package != "torch" or name not in _IN_ORDER:
        raise UserError(
            f"{files.name}: its activation function {activation} can't be applied; known are {', '.join(_IN_ORDER)}"
        )
    _prompts(general, where)  # or says what is wrong with them
    prompt = (general.get("prompts") or {}).get(general.get("default_prompt_name")) or ""
    chat = None if chat_template is None else "structured" if _is_structured(chat_template) else "flat"
    if modules is None:  # of these files sentence-transformers then reads none but those of transformers
        if prompt:
            raise UserError(
                f"{where}: has a default prompt, which needs {MODULES_NAME} beside it; bring back that file"
            )
        return PairFiles(activation=name, chat=chat)
    kinds, paths = [_kind(files, module) for module in modules], [module.get("path") or "" for module in modules]
    if kinds != ["Transformer"] or paths != [""]:
        raise UserError(
            f"{files.name}: {MODULES_NAME} has the modules {', '.join(kinds)}; a cross-encoder can have one Transformer, in the "
            "folder itself"
        )
    settings: dict[str, Any] = {}
    _transformer(files, "", settings, of_pairs=True)
    message = (settings["modalities"] or {}).get("message")
    chat = None if message is None else message.get("format") or chat
    return PairFiles(prompt, settings["query_max_length"], settings["lower_case"], name, chat)


def _is_structured(chat_template: Any) -> bool:
    """Whether messages are lists of parts, as sentence-transformers guesses it from the text of the template."""
    signs = ("content[0]", ".type", "'type'", '"type"', "message.content[")
    return not isinstance(chat_template, str) or any(sign in chat_template for sign in signs)


def _kind(files: ModelFiles, module: dict[str, Any]) -> str:
    """The kind of a module. UserError unless it is a class of sentence-transformers with a path inside the folder."""
    name, path = str(module.get("type")), str(module.get("path") or "")
    if Path(path).is_absolute() or ".." in Path(path).parts:
        raise UserError(f"{files.name}: {MODULES_NAME} has the path {path!r}, which leads out of the folder")
    package, *_, kind = name.split(".")
    kind = "Transformer" if kind in _BACKBONES else kind
    if package != "sentence_transformers" or kind not in ("Transformer", "Pooling", "Dense", "Normalize"):
        raise UserError(f"{files.name}: {MODULES_NAME} has the module {name}, which can't be applied here")
    return kind


class _Content(dict):
    """The config.json of a module, with its name for errors. UserError for non-empty keys unknown for `kind`."""

    def __init__(self, files: ModelFiles, path: str, kind: str | None = None, name: str = "config.json"):
        place = f"{path}/{name}" if path else name
        content = files.read(place)
        super().__init__(content or {})
        self.path, self.where = path, f"{files.name}: {place}"
        if content is None and kind not in (None, "Transformer"):
            raise UserError(f"{self.where} is missing; bring back the file")
        for key in self.keys() - _KNOWN.get(kind or "", self.keys()):
            self.require(key, False, {}, [], "")
        for key in self.keys() & _TYPES.keys():
            if self[key] is not None and type(self[key]) not in _TYPES[key]:
                raise UserError(f"{self.where}: {key} {json.dumps(self[key])} must be a {_TYPES[key][0].__name__}")

    def __missing__(self, name: str) -> Any:
        raise UserError(f"{self.where}: {name} is missing; bring back the file")

    def require(self, name: str, *allowed: Any) -> None:
        """UserError if the file has a value other than null or one of those allowed."""
        if self.get(name) not in (None, *allowed):
            raise UserError(f"{self.where}: {name} {json.dumps(self[name])} can't be applied here")


def _prompts(general: dict[str, Any], where: str) -> dict[str, Any]:
    """The prefixes: the prompts named after each side, ignoring case, else the default prompt, else none."""
    prompts, chosen = general.get("prompts") or {}, general.get("default_prompt_name")
    if not isinstance(prompts, dict) or not all(isinstance(text, str | None) for text in prompts.values()):
        raise UserError(f"{where}: prompts {json.dumps(prompts)}: must be texts by name")
    if chosen is not None and chosen not in prompts:
        raise UserError(f"{where}: default_prompt_name {json.dumps(chosen)} is not among {', '.join(prompts)}")
    lowered = {name.lower(): text for name, text in reversed(list(prompts.items()))} | prompts
    default = prompts.get(chosen) or ""
    sides = {"query_prefix": ("query",), "doc_prefix": ("document", "passage", "corpus")}
    found = {side: next((n for n in names if n in lowered), None) for side, names in sides.items()}
    settings = {side: default if name is None else lowered[name] or "" for side, name in found.items()}
    for side, text in settings.items():
        if TEXT_PLACE in text:
            raise UserError(f"{where}: the prompt {text!r} has a {TEXT_PLACE}; take that out of the file")
    taken = {"query", "document", *found.values()}
    return settings | {"prompts": {name: text or "" for name, text in prompts.items() if name.lower() not in taken}}


def _pooling(content: _Content) -> str:
    modes = content.get("pooling_mode")
    if modes is None:
        return "+".join(name for name, (_, flag) in _POOLINGS.items() if content.get(flag)) or "mean"
    names = {mode: name for name, (mode, _) in _POOLINGS.items()}
    modes = modes if isinstance(modes, list) and modes else [modes]
    for mode in modes:
        if not isinstance(mode, str) or mode not in names:
            raise UserError(f"{content.where}: pooling_mode {json.dumps(mode)}: known are {', '.join(names)}")
    return "+".join(names[mode] for mode in modes)


def _dense(content: _Content) -> dict[str, Any]:
    name = str(content.get("activation_function", "torch.nn.modules.activation.Tanh"))
    if not name.startswith("torch.nn.") or name.split(".")[-1] not in ACTIVATIONS:
        raise UserError(f"{content.where}: activation_function {name!r} is unknown; known are {', '.join(ACTIVATIONS)}")
    for key in ("module_input_name", "module_output_name"):
        content.require(key, "sentence_embedding")
    return {
        "type": "Dense",
        "path": content.path,
        "in_features": content["in_features"],
        "out_features": content["out_features"],
        "bias": content.get("bias", True),
        "activation": name.split(".")[-1],
        "use_residual": content.get("use_residual", False),
    }


def _transformer(files: ModelFiles, path: str, settings: dict[str, Any], of_pairs: bool = False) -> int | None:
    """Add the Transformer module's content to settings; return its tokenizer's length, for use if no other is given."""
    names = [f"sentence_{kind}_config.json" for kind in _KINDS]
    found = (_Content(files, path, "Transformer", name) for name in names)
    content = next(filter(None, found), _Content(files, path, "Transformer", names[0]))
    content.require("transformer_task", "sequence-classification" if of_pairs else "feature-extraction")
    content.require("module_output_name", "scores" if of_pairs else "token_embeddings")
    for name in ("processing_kwargs", "query_expansion"):
        content.require(name, {})
    modalities = settings["modalities"] = content.get("modality_config") or {"text": {}}
    text = modalities.get("text", {"method": None})
    if ("message" in modalities and not of_pairs) or text.get("method", "forward") != "forward":
        raise UserError(f"{content.where}: modality_config {', '.join(modalities)}: only text can be embedded here")
    for what, harmless in _HARMLESS.items():
        for name in (f"{what}_args", f"{what}_kwargs", "processor_kwargs" if what == "tokenizer" else f"{what}_args"):
            for argument, value in (content.get(name) or {}).items():
                if (what, argument, value) == ("config", "use_bidirectional_attention", True):
                    settings["bidirectional"] = True
                    continue
                if argument not in harmless | {"trust_remote_code"}:
                    raise UserError(f"{content.where}: {name} {argument}={value!r} can't be applied here")
    tokenizer = _Content(files, path, name="tokenizer_config.json")
    tokenizer.require("truncation_side", "right")
    given = (content.get(name) or {} for name in ("tokenizer_args", "tokenizer_kwargs", "processor_kwargs"))
    lengths = [arguments["model_max_length"] for arguments in given if arguments.get("model_max_length")]
    longest = next(iter(lengths), content.get("max_seq_length"))
    settings["query_max_length"] = content.get("query_length") or longest
    settings["doc_max_length"] = content.get("document_length") or longest
    settings["lower_case"] = content.get("do_lower_case", False)
    length = tokenizer.get("model_max_length")
    return int(length) if length is not None and length < _UNLIMITED else None


def load_head(layers: list[dict[str, Any]], files: ModelFiles) -> torch.nn.Sequential:
    """The modules after the pooling, with the float32 weights of their Dense layers. UserError if those don't fit."""
    from safetensors.torch import load_file

    head = build_head(layers)
    for module, layer in zip(head, layers):
        if layer["type"] != "Dense":
            continue
        path = head_weights(layer, files)
        if path is None:
            raise UserError(f"{files.name}: {layer['path']} has no weights (model.safetensors or pytorch_model.bin)")
        is_safe = path.suffix == ".safetensors"
        weights = load_file(path) if is_safe else torch.load(path, map_location="cpu", weights_only=True)
        try:
            module.load_state_dict(weights)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise UserError(f"{path}: does not fit the config.json beside it: {reason}") from None
    return head


def head_weights(layer: dict[str, Any], files: ModelFiles) -> Path | None:
    """The weight file of a Dense layer."""
    names = ("model.safetensors", "pytorch_model.bin")
    return next(filter(None, (files.find(f"{layer['path']}/{name}") for name in names)), None)


def write_modules(
    folder: Path,
    card: EmbeddingCard,
    dimensions: int,
    head_state: dict[str, torch.Tensor],
    model_options: dict[str, Any],
    config_options: dict[str, Any] | None = None,
) -> None:
    """Add our card and sentence-transformers' modules to the folder of a transformers model or PEFT adapter.

    The format can be read by all versions, TEI and vLLM (docs/models.md). `dimensions` are those of a token's state,
    head_state the weights after the pooling, model_options and config_options the arguments of AutoModel and
    AutoConfig. Prefixes become prompts.
    """
    from safetensors.torch import save_file

    layers = [x | {"path": f"{i}_Dense"} if x["type"] == "Dense" else x for i, x in enumerate(card.head, 2)]
    replace(card, head=layers).save(folder)
    kinds = ["Transformer", "Pooling", *(layer["type"] for layer in layers)]
    paths = ["", *(f"{i}_{kind}" for i, kind in enumerate(kinds[1:], 1))]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(zip(kinds, paths))
    ]
    _write(folder / MODULES_NAME, modules)
    for path in paths[1:]:
        (folder / path).mkdir()
    longest = max(card.query_max_length, card.doc_max_length)
    transformer: dict[str, Any] = {"max_seq_length": longest, "do_lower_case": card.lower_case}
    if card.query_max_length != card.doc_max_length:  # since version 6
        transformer |= {"query_length": card.query_max_length, "document_length": card.doc_max_length}
    options = {"model_args": model_options, "config_args": config_options}
    _write(folder / "sentence_bert_config.json", transformer | {name: one for name, one in options.items() if one})
    names = card.pooling.split("+")
    pooling: dict[str, Any] = {"word_embedding_dimension": dimensions}
    if names == [name for name in _POOLINGS if name in names]:
        pooling |= {flag: name in names for name, (_, flag) in _POOLINGS.items()}
    else:  # an order that the flags can't express; since version 6
        pooling["pooling_mode"] = [_POOLINGS[name][0] for name in names]
    _write(folder / paths[1] / "config.json", pooling | {"include_prompt": card.include_prompt})
    for number, layer in enumerate(layers):
        if layer["type"] != "Dense":
            continue
        activation = ACTIVATIONS[layer["activation"]]
        content = {name: layer[name] for name in ("in_features", "out_features", "bias")}
        content["activation_function"] = f"{activation.__module__}.{activation.__name__}"
        if layer["use_residual"]:
            content["use_residual"] = True
        _write(folder / layer["path"] / "config.json", content)
        start = f"{number}."
        weights = {n.removeprefix(start): w.contiguous() for n, w in head_state.items() if n.startswith(start)}
        save_file(weights, folder / layer["path"] / "model.safetensors", metadata={"format": "pt"})
    prefixes = {"query": card.query_prefix, "document": card.doc_prefix}
    general = {
        "__version__": {"sentence_transformers": "5.0.0"},  # the version of this format
        # A prompt can't express what a prefix adds after the text.
        "prompts": {side: text.partition(TEXT_PLACE)[0] for side, text in prefixes.items()} | card.prompts,
        "default_prompt_name": None,
        "similarity_fn_name": card.similarity,
    }
    _write(folder / _PROMPTS_NAME, general)


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
