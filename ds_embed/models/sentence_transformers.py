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
_UNLIMITED = 10**9  # tokens; a tokenizer without a limit has 10^30


@dataclass(frozen=True)
class ModelFiles:
    """The files of a folder, or of a hub repository at a revision (default main), looked up like in from_pretrained."""

    name: str
    revision: str | None = None

    def find(self, path: str) -> Path | None:
        """The local path of a file, downloaded if necessary; None if it does not exist or the hub can't be reached."""
        from transformers.utils import cached_file

        quiet = ("gated_repo", "missing_entries", "connection_errors")
        options = {f"_raise_exceptions_for_{what}": False for what in quiet}
        try:
            found = cached_file(self.name, path, revision=self.revision, **options)
        except OSError:  # no such repository or revision: loading its config reports that
            return None
        return None if found is None else Path(found)

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
    settings = _prompts(general, where) | {"similarity": general.get("similarity_fn_name")}
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
    return OwnFiles({n: value for n, value in settings.items() if value is not None}, True, paths[0], length)


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
    modes = [modes] if isinstance(modes, str) else modes
    for mode in modes:
        if mode not in names:
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


def _transformer(files: ModelFiles, path: str, settings: dict[str, Any]) -> int | None:
    """Add the Transformer module's content to settings; return its tokenizer's length, for use if no other is given."""
    names = [f"sentence_{kind}_config.json" for kind in _KINDS]
    found = (_Content(files, path, "Transformer", name) for name in names)
    content = next(filter(None, found), _Content(files, path, "Transformer", names[0]))
    content.require("transformer_task", "feature-extraction")
    content.require("module_output_name", "token_embeddings")
    for name in ("processing_kwargs", "query_expansion"):
        content.require(name, {})
    modalities = content.get("modality_config") or {"text": {}}
    text = modalities.get("text", {"method": None})
    if "message" in modalities or text.get("method", "forward") != "forward":
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
