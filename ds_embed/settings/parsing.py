"""Parse argv and an optional YAML file into argument dataclasses; every mistake raises a UserError."""

import dataclasses
import difflib
import json
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ds_embed.settings.errors import UserError
from ds_embed.settings.help_page import help_page

_NOT_GIVEN = object()
# Our counterparts of flags of Hugging Face's trainer, sentence-transformers, Tevatron, FlagEmbedding, Automodel, ms-swift.
_OURS = {
    "--global_batch_size, over all ranks": "per_device_train_batch_size local_batch_size batch_size train_batch_size",
    "--micro_batch_tokens, the tokens of a forward pass": "per_device_eval_batch_size mini_batch_size sub_batch_size "
    "gc_q_chunk_size gc_p_chunk_size cached_batch_size",
    "--global_batch_size, over all ranks; --micro_batch_tokens splits it": "gradient_accumulation_steps",
    "not needed: negatives always come from all ranks": "negatives_cross_device negatives_x_device gather_across_devices "
    "do_distributed_inbatch_negative",
    "--save_interval": "save_steps ckpt_every_steps",
    "--log_interval": "logging_steps",
    "--val_check_interval": "eval_steps val_every_steps",
    "--val_before_training": "eval_on_start",
    "--load_best_at_end": "load_best_model_at_end",
    "--best_metric": "metric_for_best_model",
    "--lr_scheduler": "lr_scheduler_type",
    "--learning_rate": "lr",
    "--num_train_epochs": "num_epochs epochs n_epochs max_epochs train_epochs",
    "--max_grad_norm": "gradient_clipping",
    "--query_max_length": "query_max_len q_max_len",
    "--doc_max_length": "passage_max_len p_max_len",
    "--max_length": "max_seq_length",
    "--hard_negatives, which is one less": "train_group_size n_passages train_n_passages",
    "--lora_rank": "lora_r lora",
    "--doc_prefix": "passage_prefix passage_instruction_for_retrieval",
    "--query_prefix": "query_instruction_for_retrieval query_instruction_for_embedding",
    "--query_prefix, with {text} for the query": "query_instruction_format",
    "--doc_prefix, with {text} for the document": "passage_instruction_format",
    "--pooling": "sentence_pooling_method pooling_method",
    "--normalize": "normalize_embeddings l2_normalize",
    "--temperature, which is 1 / scale": "scale",
    "--train_files": "train_data dataset dataset_path data_dir_list",
    "--train_files, NAME:SPLIT": "dataset_name",
    "--corpus_files, NAME:SPLIT": "corpus_name",
    "--corpus_files": "corpus_path",
    "--model_name_or_path": "model pretrained_model_name_or_path",
    "not needed: --resume_if_exists resumes the run in --output_dir": "resume_from_checkpoint",
    "not available: an existing --output_dir is either resumed or refused": "overwrite_output_dir",
    "--bf16: bfloat16 or float32": "fp16",
    "--distillation_weight": "knowledge_distillation kd_loss_type",
    "not needed: data is tokenized once and memory-mapped": "dataloader_num_workers",
    "not needed: every batch is full": "dataloader_drop_last",
}
ELSEWHERE = {
    name: ours if ours.startswith("not ") else f"use {ours}" for ours, names in _OURS.items() for name in names.split()
}


def parse_arguments(
    *types: type,
    argv: Sequence[str] | None = None,
    defaults: Mapping[str, Any] | None = None,
    defaults_for: Callable[[dict[str, Any]], Mapping[str, Any]] | None = None,
) -> tuple[Any, ...]:
    """Fill dataclasses from flags and from `--config FILE.yaml`, whose keys are flag names; flags win.

    `defaults` override the fields' own defaults, and the result of `defaults_for`, called with the given settings,
    overrides both; a required field that is in `defaults` may be omitted.
    Returns one instance per type. Raises UserError on an unknown flag or key (with the nearest known
    name), on a value of the wrong type, on a missing required flag, and whatever the dataclasses'
    own checks raise.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    # The deepspeed launcher adds --local_rank=N; the same number is in LOCAL_RANK.
    argv = [arg for arg in argv if not re.fullmatch(r"--local_rank=\d+", arg)]
    parser = _make_parser(types)
    defaults = defaults or {}
    parser.set_defaults(**defaults)
    for action in parser._actions:
        action.required = action.required and action.dest not in defaults
    known = {action.dest: action for action in parser._actions if action.dest != "help"}
    first = type(parser)([], allow_abbrev=False, add_help=False)
    first.add_argument("--config", type=Path)
    config, argv = first.parse_known_args(argv)
    num_from_file = 0
    if config.config is not None:
        from_file = _yaml_as_flags(config.config, known)
        argv, num_from_file = [*from_file, *argv], len(from_file)
    for arg in argv:  # unknown flags are reported before missing ones
        name = arg.split("=")[0]
        if name.startswith("--") and " " not in name and name not in parser._option_string_actions:
            name = name.lstrip("-").replace("-", "_")
            if name in ELSEWHERE:
                raise UserError(f"--{name}: unknown flag; {ELSEWHERE[name]}")
            raise UserError(f"unknown flag --{name}{_nearest(name, known, '--')}; --help lists all")
    fields = [field for t in types for field in dataclasses.fields(t)]
    lists_of_files = {field.name for field in fields if field.metadata.get("declared", (0, 0, False))[2]}
    for action in parser._actions:  # the last of the two would win, and the files of the first be lost
        if (
            action.nargs == "+"
            and action.dest in lists_of_files
            and sum(arg.split("=")[0] in action.option_strings for arg in argv[num_from_file:]) > 1
        ):
            raise UserError(f"--{action.dest}: given twice; give all its values behind one")
    namespace, unknown = parser.parse_known_args(argv, Namespace(**dict.fromkeys(known, _NOT_GIVEN)))
    for arg in unknown:
        raise UserError(f"unexpected argument '{arg}': flags start with --")
    given = {name: value for name, value in vars(namespace).items() if value is not _NOT_GIVEN}
    # A boolean that is true by default has a second flag, --no_NAME; the first one holds the default.
    values = {action.dest: action.default for action in reversed(parser._actions)}
    values |= {**(defaults_for(given) if defaults_for else {}), **given}
    return tuple(t(**{f.name: values[f.name] for f in dataclasses.fields(t) if f.name in values}) for t in types)


def _make_parser(types):
    from transformers import HfArgumentParser

    class Parser(HfArgumentParser):
        def format_help(self):
            return help_page(list(types), self, self.prog)

        def add_argument(self, *names, declared=None, needs="", **kwargs):
            return super().add_argument(*names, **kwargs)

        def error(self, message):
            # Every flag also exists with dashes; naming both would only make the message longer.
            message = re.sub(r"/--[a-z0-9-]+", "", message)
            raise UserError(message.replace("the following arguments are required:", "missing required flag(s)"))

    script = Path(sys.argv[0])
    prog = f"ds-embed {script.stem.replace('_', '-')}" if script.parent.name == "recipes" else script.name
    return Parser(list(types), allow_abbrev=False, prog=prog)


def _yaml_as_flags(path: Path, known: dict) -> list[str]:
    import yaml

    if not path.is_file():
        raise UserError(f"--config {path}: no such file")

    class Loader(yaml.SafeLoader):
        """As yaml.safe_load, but a key that stands twice is an error, not the last of the two."""

        def construct_mapping(self, node, deep=False):
            seen = set()
            for key, _ in node.value:
                if key.value in seen:
                    problem = f"'{key.value}' stands twice"
                    raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key.start_mark)
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(f"{where}: not valid YAML: {getattr(error, 'problem', error)}") from None
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected 'name: value' lines, got a {type(content).__name__}")
    flags = []
    if isinstance(files := content.get("train_files"), list) and any(isinstance(one, dict) for one in files):
        content |= _of_each_file(path, files, content)
    for key, value in content.items():
        if key not in known:
            if key in ELSEWHERE:
                raise UserError(f"{path}: {key}: unknown key; {ELSEWHERE[key]}")
            raise UserError(f"{path}: unknown key '{key}'{_nearest(str(key), known, '')}")
        if isinstance(value, dict):
            raise UserError(f"{path}: key '{key}' takes a value or a list, not a mapping")
        if value is None or value == []:
            continue  # 'name:' without a value keeps the default
        values = value if isinstance(value, list) else [value]
        # 1e-4 without a dot is a string in YAML 1.1, so everything goes through the flag's own type.
        flags += [f"--{key}", *map(_as_flag, values)]
    return flags


def _as_flag(value: Any) -> str:
    if isinstance(value, list):
        return json.dumps(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


# What a file of train_files can have of its own in YAML, and the list behind train_files that it stands in.
_PER_FILE = {
    "path": "train_files",
    "weight": "sampling_probabilities",
    "negatives": "negatives_per_file",
    "hard_negatives": "hard_negatives_per_file",
    "temperature": "temperature_per_file",
    "query_prefix": "query_prefixes",
    "doc_prefix": "doc_prefixes",
    "query_max_length": "query_max_length_per_file",
    "doc_max_length": "doc_max_length_per_file",
}


def _of_each_file(path: Path, files: list, content: dict) -> dict[str, list]:
    """The lists that stand for train_files as mappings; what a file does not say is that of the whole YAML file."""
    files = [one if isinstance(one, dict) else {"path": one} for one in files]
    names = {name for one in files for name in one}
    for name in names - _PER_FILE.keys():
        raise UserError(f"{path}: train_files: unknown key '{name}'{_nearest(str(name), _PER_FILE, '')}")
    lists = {}
    for name in ["path", *sorted(names - {"path"})]:
        lists[_PER_FILE[name]] = [one.get(name, content.get(name)) for one in files]
        if None in lists[_PER_FILE[name]]:
            number = lists[_PER_FILE[name]].index(None)
            shown = f"{number + 1} ({files[number].get('path')})"
            raise UserError(f"{path}: train_files: number {shown} has no {name}, and others have one; give one for all")
        if name != "path" and _PER_FILE[name] in content:
            raise UserError(
                f"{path}: {_PER_FILE[name]} and a {name} in train_files say the same; leave one of them out"
            )
    return lists


def _nearest(name: str, known: Mapping, dashes: str) -> str:
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6) or [
        one for one in known if len(name) > 3 and name in one
    ]
    return f" (did you mean {dashes}{match[0]}?)" if match else ""
