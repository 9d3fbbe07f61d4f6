"""The token store of a training run: built once by rank 0, memory-mapped by all, checked against the settings."""

import json
import logging
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from ds_embed.data.batch import GlobalBatch
from ds_embed.data.forms import Reading
from ds_embed.data.order import SampleOrder
from ds_embed.data.store import TrainingStore, build_training_store, check_texts_fit
from ds_embed.data.tally import describe_skipped
from ds_embed.data.tokenize import TextFormat
from ds_embed.job.ranks import World
from ds_embed.models.card import EmbeddingCard
from ds_embed.settings import DataArguments, StepArguments
from ds_embed.settings.data_arguments import unescape
from ds_embed.settings.errors import UserError

logger = logging.getLogger(__name__)


def prepare_store(
    world: World,
    files: list[str],
    data: DataArguments,
    step: StepArguments,
    tokenizer: Any,
    formats: tuple[TextFormat | list[TextFormat], TextFormat | list[TextFormat]],
    name: str = "token store",
) -> TrainingStore:
    """Build or find the store of `files`, of training or held-out records, and check that every setting fits it.

    `formats` says how queries and documents become tokens. `name` must be unique in the job.
    """
    num_negatives = data.hard_negatives if data.hard_negatives_sampling == "first" else None  # None: all

    def build() -> str:
        path = build_training_store(
            files,
            tokenizer,
            *formats,
            num_negatives,
            data.cache_dir,
            skip_bad_records=data.skip_bad_records,
            reading=Reading(tuple(data.columns), tuple(data.corpus_files), scored=step.pair_loss is not None),
        )
        store = TrainingStore.open(path)
        logger.info("%s\n%s", name, "\n".join(store.describe()))
        check_store(store, data, step)
        return str(path)

    return TrainingStore.open(world.on_main(name, build))


def file_formats(
    data: DataArguments, card: EmbeddingCard
) -> tuple[TextFormat | list[TextFormat], TextFormat | list[TextFormat]]:
    """How queries and documents become tokens: the card's way, or with a prefix for each file."""
    query_format, document_format = card.text_formats()
    return (
        [replace(query_format, prefix=unescape(prefix)) for prefix in data.query_prefixes] or query_format,
        [replace(document_format, prefix=unescape(prefix)) for prefix in data.doc_prefixes] or document_format,
    )


def describe_prefixes(data: DataArguments, card: EmbeddingCard) -> list[str]:
    """Lines that say which prefix each file is trained with and which one the model stores, if they differ."""
    lines = []
    for what, prefixes, kept in (
        ("queries", data.query_prefixes, card.query_prefix),
        ("documents", data.doc_prefixes, card.doc_prefix),
    ):
        if prefixes:
            pairs = zip(data.train_files, prefixes)
            lines += [f"{what:<14} {json.dumps(unescape(p), ensure_ascii=False)} for {path}" for path, p in pairs]
            lines.append(f"{what:<14} {json.dumps(kept, ensure_ascii=False)} stored with the model, for later {what}")
    return lines


def check_store(store: TrainingStore, data: DataArguments, step: StepArguments) -> None:
    """Raise UserError, with file and line if known, when the data does not fit the settings."""
    for line in describe_skipped(store.manifest.get("skipped_records", {})):
        logger.warning("training data: %s", line)
    num_queries = sum(size for size, kind in zip(store.file_sizes, store.kinds_of_files) if not kind)
    for file in store.manifest["files"]:
        if file.get("kind") == "scored":
            _check_scored(file, step)
    first, number = (store.manifest[f"{what}_without_negatives"] for what in ("first_record", "records"))
    if data.hard_negatives and number == num_queries:
        raise UserError(
            f"--hard_negatives {data.hard_negatives}: no record has a neg_doc{f' (the first: {first})' if first else ''}; set it to 0 or add them"
        )
    if data.hard_negatives and number and step.negatives == "pair":
        raise UserError(
            f"{first}: has no neg_doc, but rerankers and --negatives pair score a query only against its own hard negatives "
            f"({number:,} of {num_queries:,} records have none); remove these records, add negatives, or train an embedder "
            "with --negatives own"
        )
    if data.hard_negatives and number:
        share = number / num_queries
        logger.info(
            "%s of %s records (%.1f%%) have no hard negatives: these queries are scored only against the documents of "
            "the batch",
            f"{number:,}",
            f"{num_queries:,}",
            100 * share,
        )
    check_texts_fit(store, step.micro_batch_tokens)
    if num_queries and step.negatives == "pair" and data.hard_negatives == 0:
        raise UserError("--negatives pair: scores each positive against hard negatives; set --hard_negatives 1 or more")
    if step.distillation_weight:
        _check_scores(store, data)


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


def _check_scores(store: TrainingStore, data: DataArguments) -> None:
    if data.hard_negatives == 0:
        raise UserError(
            "--distillation_weight: the teacher ranks a query's hard negatives; set --hard_negatives 1 or more"
        )
    first = store.manifest["first_record_without_scores"]
    if first:
        raise UserError(
            f"{first}: has no pos_score and neg_scores, which --distillation_weight needs in every record "
            f"({store.manifest['records_without_scores']:,} records lack them); add them or set --distillation_weight 0"
        )


def check_contrast(batches: Iterable[GlobalBatch], store: TrainingStore, negatives: str, setting: str) -> None:
    """Raise UserError if no query of these batches has a negative, so that the loss is 0; warn if some have none.

    `setting` names the files in messages.
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
    """The order of the run's samples. UserError when a file can't fill a batch of its own."""
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
