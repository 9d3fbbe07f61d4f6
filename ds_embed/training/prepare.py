"""The token store of a training run: built once by rank 0, memory-mapped by all, checked against the settings."""

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import numpy as np

from ds_embed.data.batch import GlobalBatch, assemble_batch
from ds_embed.data.forms import Reading
from ds_embed.data.order import SampleOrder
from ds_embed.data.store import Formats, TrainingStore, build_training_store, check_texts_fit
from ds_embed.data.tally import describe_skipped
from ds_embed.data.tokenize import TextFormat
from ds_embed.job.ranks import World
from ds_embed.models.card import EmbeddingCard
from ds_embed.settings import DataArguments, StepArguments
from ds_embed.settings.data_arguments import check_one_for_each, prefixes_of
from ds_embed.settings.errors import UserError
from ds_embed.settings.fields import listed

logger = logging.getLogger(__name__)


def prepare_store(
    world: World,
    files: list[str],
    data: DataArguments,
    step: StepArguments,
    tokenizer: Any,
    formats: tuple[Formats, Formats],
    name: str = "token store",
) -> TrainingStore:
    """Build or find the store of `files`, of training or held-out records, and check that every setting fits it.

    `formats` says how queries and documents become tokens. `name` must be unique in the job.
    """
    most = max(data.hard_negatives_per_file or [data.hard_negatives])
    num_negatives = most if data.hard_negatives_sampling == "first" else None  # None: all

    kinds = ("labels",) * isinstance(data, DataArguments) + ("scored",) * (step.pair_loss is not None)

    def build() -> str:
        path = build_training_store(
            files,
            tokenizer,
            *formats,
            num_negatives,
            data.cache_dir,
            skip_bad_records=data.skip_bad_records,
            reading=Reading(tuple(data.columns), tuple(data.corpus_files), kinds),
        )
        store = TrainingStore.open(path)
        logger.info("%s\n%s", name, "\n".join(store.describe()))
        check_store(store, data, step)
        return str(path)

    return TrainingStore.open(world.on_main(name, build))


def file_formats(data: DataArguments, card: EmbeddingCard) -> tuple[Formats, Formats]:
    """How queries and documents become tokens: the card's way, or with a prefix or a length for each file."""
    queries, documents = card.text_formats()
    query_prefixes, doc_prefixes = _prefixes_of_files(data)
    return (
        _formats("query_max_length", queries, query_prefixes, data.query_max_length_per_file),
        _formats("doc_max_length", documents, doc_prefixes, data.doc_max_length_per_file),
    )


def _prefixes_of_files(data: DataArguments) -> list[list[list[str]]]:
    """The prefixes of each file, of queries and of documents; no list where the files have none of their own."""
    names = "query_prefixes", "doc_prefixes"
    return [[prefixes_of(name, entry) for entry in getattr(data, name)] for name in names]


def _formats(name: str, one: TextFormat, prefixes: list[list[str]], lengths: list[int]) -> Formats:
    if not prefixes and not lengths:
        return one
    if max([0, *lengths]) > one.max_length:
        raise UserError(
            f"--{name}_per_file {listed(lengths)}: the model's own length, which later texts are cut at, is {one.max_length}; "
            f"lower the file's, or raise --{name} or --max_length"
        )
    ways = zip_longest(prefixes, lengths)
    lists = [
        [
            replace(one, prefix=prefix, max_length=one.max_length if length is None else length)
            for prefix in (drawn or [one.prefix])
        ]
        for drawn, length in ways
    ]
    return [formats if len(formats) > 1 else formats[0] for formats in lists]


def describe_prefixes(data: DataArguments, card: EmbeddingCard) -> list[str]:
    """Lines that say which prefix each file is trained with and which one the model stores, if they differ."""
    lines = []
    kept = card.query_prefix, card.doc_prefix
    for what, files, stored in zip(("queries", "documents"), _prefixes_of_files(data), kept):
        for path, prefixes in zip(data.train_files, files):
            shown = " or ".join(json.dumps(prefix, ensure_ascii=False) for prefix in prefixes)
            lines.append(f"{what:<14} {shown} for {path}")
        if files:
            lines.append(f"{what:<14} {json.dumps(stored, ensure_ascii=False)} stored with the model, for later {what}")
    return lines


def check_store(store: TrainingStore, data: DataArguments, step: StepArguments) -> None:
    """Raise UserError, with file and line if known, when the data does not fit the settings."""
    for line in describe_skipped(store.manifest.get("skipped_records", {})):
        logger.warning("training data: %s", line)
    num_queries = sum(size for size, kind in zip(store.file_sizes, store.kinds_of_files) if not kind)
    first, number = (store.manifest[f"{what}_without_negatives"] for what in ("first_record", "records"))
    modes, hards = modes_of_files(data, step, len(store.file_sizes))
    if any(hards) and number == num_queries and "labels" not in store.kinds_of_files:
        raise UserError(
            f"--hard_negatives {max(hards)}: no record has a neg_doc{f' (the first: {first})' if first else ''}; set it to 0 or add them"
        )
    for file, kind, mode, hard in zip(store.manifest["files"], store.kinds_of_files, modes, hards):
        if kind == "scored":
            _check_scored(file, step)
            if data.hard_negatives_per_file and hard:
                raise UserError(
                    f"--hard_negatives_per_file {hard}: {file['path']} has scored pairs, which have no negatives; set 0 for it"
                )
        elif mode in ("hard", "pair") and not hard:
            raise UserError(
                f"--negatives {mode}: scores each positive of {file['path']} against hard negatives; set --hard_negatives 1 or more"
            )
        elif mode in ("hard", "pair") and "without_negatives" in file:
            raise UserError(
                f"{file['without_negatives']}: has no neg_doc, but rerankers and --negatives {mode} score a query only against "
                f"its own hard negatives ({number:,} of {num_queries:,} records have none); remove these records, add "
                "negatives, or train an embedder with --negatives own"
            )
    if "labels" in store.kinds_of_files:
        _check_labels(store)
    if any(hards) and number:
        share = number / num_queries
        logger.info(
            "%s of %s records (%.1f%%) have no hard negatives: these queries are scored only against the documents of "
            "the batch",
            f"{number:,}",
            f"{num_queries:,}",
            100 * share,
        )
    check_texts_fit(store, step.micro_batch_tokens)
    if step.hardness_weight and not any(hards):
        raise UserError(
            f"--hardness_weight {step.hardness_weight:g}: weights a query's own hard negatives, and --hard_negatives is 0; set "
            "that to 1 or more"
        )
    if step.distillation_weight:
        _check_scores(store, min(hards))


def _check_labels(store: TrainingStore) -> None:
    """UserError unless every label stands twice, and its file has another one."""
    texts = store.labelled
    number, in_file = texts.of_label[1], texts.of_file[1]
    for is_bad, problem in (
        (number == 1, "no other text of its file has its label, so there is no positive for it; leave it out"),
        (number == in_file, "every text of its file has this label, so there is no negative for it"),
    ):
        if is_bad.any():
            raise UserError(f"{store.location(int(texts.records[np.argmax(is_bad)]))}: {problem}")


def _check_scored(file: dict[str, Any], step: StepArguments) -> None:
    """Raise UserError if all scores of a file of scored pairs are equal, or if the loss needs cosines and they are none."""
    low, high = file["score_range"]
    if low == high:
        raise UserError(f"{file['path']}: every pair has the score {low:g}, so there is nothing to learn")
    if step.pair_loss == "cosine" and (low < -1 or high > 1):
        raise UserError(
            f"--pair_loss cosine: the scores of {file['path']} range from {low:g} to {high:g}, but a cosine from -1 to 1; "
            "rescale them, or set --pair_loss cosent, which uses only their order"
        )


def modes_of_files(data: DataArguments, step: StepArguments, num_files: int) -> tuple[list[str], list[int]]:
    """What each file's queries are scored against, and how many hard negatives each has."""
    return (
        list(step.negatives_per_file) or [step.negatives] * num_files,
        list(data.hard_negatives_per_file) or [data.hard_negatives] * num_files,
    )


def training_batch(
    store: TrainingStore, order: SampleOrder, data: DataArguments, step: StepArguments, first_sample: int
) -> GlobalBatch:
    """The global batch of the samples from `first_sample` on; file by file where the files' settings differ."""
    is_by_file = data.hard_negatives_per_file or step.negatives_per_file or step.temperature_per_file
    return assemble_batch(
        store,
        order,
        first_sample=first_sample,
        num_queries=step.global_batch_size,
        hard_negatives=modes_of_files(data, step, len(store.file_sizes))[1] if is_by_file else data.hard_negatives,
        hard_negatives_sampling=data.hard_negatives_sampling,
    )


def _check_scores(store: TrainingStore, fewest: int) -> None:
    if fewest == 0:
        raise UserError(
            "--distillation_weight: the teacher ranks a query's hard negatives; set --hard_negatives 1 or more"
        )
    first = store.manifest["first_record_without_scores"]
    if first:
        raise UserError(
            f"{first}: has no pos_score and neg_scores, which --distillation_weight needs in every record "
            f"({store.manifest['records_without_scores']:,} records lack them); add them or set --distillation_weight 0"
        )


def check_contrast(
    batches: Iterable[GlobalBatch], store: TrainingStore, negatives: Sequence[str], setting: str
) -> None:
    """Raise UserError if no query of these batches has a negative, so that the loss is 0; warn if some have none.

    negatives: as GlobalBatch.without_negatives takes them. `setting` names the files in messages.
    """
    looked_at = [(batch.records, batch.without_negatives(negatives)) for batch in batches]
    lacking = np.concatenate([lacks for _, lacks in looked_at])
    if not lacking.any():
        return
    records = np.concatenate([records[: len(lacks)] for records, lacks in looked_at])
    example = store.location(int(records[np.argmax(lacking)]))
    sizes = {len(records) for records, _ in looked_at}
    cure = "raise --global_batch_size, add neg_doc and set --hard_negatives, or check the data for repetitions"
    if lacking.all():
        reason = "it is alone in its batch" if sizes == {1} else "every document of its batch is one of its positives"
        raise UserError(
            f"{setting}: no query has a negative, so the loss is 0 and nothing is learned. For the query at {example}, "
            f"{reason}; {cure}"
        )
    logger.warning(
        "warning: %s: %.1f%% of the queries of the first batches have no negative and contribute nothing to the loss, "
        "such as the one at %s; %s",
        setting,
        100 * lacking.mean(),
        example,
        cure,
    )


def sample_order(store: TrainingStore, data: DataArguments, step: StepArguments, seed: int) -> SampleOrder:
    """The order of the run's samples. UserError when a file can't fill a batch of its own, or settings are not one for each."""
    for name in ("negatives_per_file", "temperature_per_file"):
        check_one_for_each(name, getattr(step, name), data.train_files)
    if data.hard_negatives_sampling != "first" and not any(modes_of_files(data, step, len(data.train_files))[1]):
        raise UserError(
            f"--hard_negatives_sampling {data.hard_negatives_sampling}: has no effect without --hard_negatives 1 or more; "
            "add that or remove it"
        )
    shares = data.sampling_probabilities
    homogeneous = data.batching == "homogeneous"
    documents = (store.first_text, store.text_keys) if data.batching == "clustered" else None
    rows, sizes = store.rows() if data.positives == "random" else (None, store.file_sizes)
    if not shares and not homogeneous:
        return SampleOrder(seed, sizes, rows=rows, documents=documents)
    for path, size in zip(data.train_files, sizes):
        if homogeneous and size < step.global_batch_size:
            raise UserError(
                f"--batching homogeneous: {path} has {size} records, fewer than --global_batch_size "
                f"{step.global_batch_size}; lower it, remove the file or set --batching mixed"
            )
    shares = shares or sizes
    probabilities = tuple(share / sum(shares) for share in shares)
    return SampleOrder(seed, sizes, probabilities, step.global_batch_size if homogeneous else None, rows, documents)


def check_prefixes(step: StepArguments, num_dims: int) -> None:
    """UserError unless the Matryoshka prefixes lie in the D dimensions of the model and include all D."""
    dims = step.matryoshka_dims
    if dims and max(dims) != num_dims:
        shown = " ".join(map(str, dims))
        raise UserError(
            f"--matryoshka_dims {shown}: the largest must be {num_dims}, the dimension of the model's embeddings, so that "
            "the whole embedding is trained too"
        )
