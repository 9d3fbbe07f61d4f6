"""Validation between two steps: loss and accuracy on held-out records, retrieval over a whole corpus.

Nothing of it reaches training: dropout off and back on, no gradient, and every random draw of a step is seeded by
that step. All ranks make the same forward passes; rank 0 searches and measures, the others learn the numbers.

Shapes: R held-out records, N queries of a batch.
"""

import contextlib
import hashlib
import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ds_embed.artifact.durable import put_in_place, remove_unfinished, unfinished_path
from ds_embed.data.ahead import made_ahead
from ds_embed.data.batch import GlobalBatch, assemble_batch
from ds_embed.data.order import sample_records
from ds_embed.data.store import TextStore, TrainingStore
from ds_embed.job.ranks import World
from ds_embed.models.card import EmbeddingCard
from ds_embed.settings import DataArguments, EncodeArguments, StepArguments, ValidationArguments
from ds_embed.settings.errors import UserError
from ds_embed.training.best import BestValidations
from ds_embed.training.prepare import check_contrast, prepare_store
from ds_embed.training.run_folder import RunFolder
from ds_embed.training.signals import StopRequest
from ds_embed.training.step import ContrastiveStep
from ds_embed.vectors.corpus import Corpus
from ds_embed.vectors.encode import encode_store
from ds_embed.vectors.generate import build_stores, link_test_doc
from ds_embed.vectors.metrics import (
    DEFAULT_MEASURES,
    SearchRun,
    evaluate,
    hint_at_identical,
    match_qrels,
    parse_measures,
    read_qrels_from_queries,
    without_identical,
)
from ds_embed.vectors.search import search
from ds_embed.vectors.vectors import Ids, read_embeddings

logger = logging.getLogger(__name__)

_LEAST_DEPTH = 100  # documents kept for each query, as recipes/evaluate.py does


class StoppedMeanwhile(Exception):
    """A signal asks the job to stop: on all ranks, at the same forward pass."""


@dataclass(frozen=True)
class _HeldOutOrder:
    """The held-out records of a file (or of all of them) in an order that is the same at every validation."""

    seed: int
    first_record: int
    num_records: int

    def records(self, first_sample: int, num_samples: int) -> np.ndarray:
        return self.first_record + sample_records(self.seed, self.num_records, first_sample, num_samples)


@dataclass
class _TestSet:
    """Queries with their right documents, searched for among all documents; `name` is "" for --val_query_files."""

    name: str
    query_files: list[str]
    stores: list[tuple[str, str, TextStore]]
    qrels: Any = None  # on rank 0

    def label(self, measure: str) -> str:
        return f"{self.name}/{measure}" if self.name else measure

    def read_qrels(self) -> None:
        """On rank 0: the right documents of the queries, all of them among the documents."""
        self.qrels = read_qrels_from_queries(self.query_files)
        queries, documents = (Ids(store.ids_path.read_bytes()) for _, _, store in self.stores)
        match_qrels(self.qrels, queries, documents, f"--val_sets {self.name}" if self.name else "--val_query_files")


class Validation:
    """What is measured and on what. Building it checks every setting and file; every rank must build it."""

    of_batches = ["val_loss", "val_accuracy"]  # of records with a right document
    of_pairs = ["val_spearman"]  # of scored pairs: the mean over their files

    def __init__(
        self,
        world: World,
        arguments: ValidationArguments,
        data: DataArguments,
        step: StepArguments,
        seed: int,
        tokenizer: Any,
        card: EmbeddingCard,
        folder: RunFolder,
    ):
        data, step = _of_all_files(data), _of_all_files(step)
        self.world, self.arguments, self.data, self.step, self.seed = world, arguments, data, step, seed
        self.folder = folder
        files = arguments.test_sets()
        self.measures = _measures(arguments) if files else []
        self.test_sets = [_TestSet(name, query_files, []) for name, (query_files, _) in files.items()]
        self.store: TrainingStore | None = None
        if arguments.val_files:
            # With the prefixes that the model keeps, also where each training file has one of its own.
            self.store = prepare_store(
                world, arguments.val_files, data, step, tokenizer, card.text_formats(), "held-out token store"
            )
            kinds = self.store.kinds_of_files
            if "labels" in kinds:
                raise UserError(
                    f"--val_files {arguments.val_files[kinds.index('labels')]}: holds labelled texts, which only training "
                    "takes; give records with a right document, or scored pairs"
                )
            self.of_batches = (self.of_batches if "" in kinds else []) + (self.of_pairs if "scored" in kinds else [])
            batches = (batch for batch, _ in itertools.islice(self._batches(), 4))
            world.on_main(
                "check held-out negatives", lambda: check_contrast(batches, self.store, [step.negatives], "--val_files")
            )
        self.names = [one.label(measure) for one in self.test_sets for measure in self.measures]
        self.names += [f"mean/{measure}" for measure in self.measures if len(files) > 1]
        self.names += self.of_batches if arguments.val_files else []
        if arguments.best_metric not in (None, *self.names):
            raise UserError(
                f"--best_metric {arguments.best_metric}: is not computed; choose one of {', '.join(self.names)}"
            )
        for one, (query_files, doc_files) in zip(self.test_sets, files.values()):
            to_encode = EncodeArguments(
                query_files=query_files,
                doc_files=doc_files,
                micro_batch_tokens=step.micro_batch_tokens,
                cache_dir=data.cache_dir,
            )
            one.stores = build_stores(world, to_encode, tokenizer, card, "val_")
            world.on_main("held-out judgments", one.read_qrels)

    def best(self) -> BestValidations:
        """The search for the best checkpoint that the settings ask for, before any validation."""
        metric = self.arguments.best_metric or self.names[0]
        stores = [store for one in self.test_sets for _, _, store in one.stores]
        stores = [self.store] if metric in self.of_batches else stores
        hashes = [file["sha256"] for store in stores for file in store.manifest["files"]]
        return BestValidations(
            metric=metric,
            data=hashlib.sha256(" ".join(hashes).encode()).hexdigest()[:16],
            top_k=self.arguments.save_top_k,
            load_at_end=self.arguments.load_best_at_end,
            patience=self.arguments.early_stopping_patience,
            min_delta=self.arguments.early_stopping_min_delta,
        )

    def is_due(self, step: int, max_steps: int, ends_epoch: bool) -> bool:
        """Whether the model after `step` is to be measured; 0 is the model before training."""
        interval = self.arguments.val_check_interval
        if step == 0:
            return self.arguments.val_before_training
        is_asked = bool(interval and step % interval == 0) or (self.arguments.val_each_epoch and ends_epoch)
        return step == max_steps or is_asked

    def describe(self) -> str:
        """What is measured, in a line."""
        parts = []
        if self.store is not None:
            parts.append(f"{self.store.num_records:,} held-out records")
        for one in self.test_sets:
            queries, documents = (store.num_records for _, _, store in one.stores)
            parts.append(f"{one.name}{one.name and ': '}{queries:,} queries in {documents:,} documents")
        interval = self.arguments.val_check_interval
        times = [f"every {interval:,} steps"] if interval else []
        times += ["after each epoch"] if self.arguments.val_each_epoch else []
        return ", ".join([" and ".join(parts), *times, "at the end"])

    def run(self, engine: Any, consumed_samples: int, stop: StopRequest) -> dict[str, float]:
        """Measure the engine's model; every rank must call it, and gets the same numbers.

        Raises StoppedMeanwhile on all ranks when a signal asks for it: the model is as it was, nothing is kept.
        """
        name = f"consumed_samples{consumed_samples}"
        final = self.folder.validation_dir / name
        target = unfinished_path(final)
        losses = {}
        engine.eval()
        try:
            if self.store is not None:
                losses = self._held_out_loss(engine, stop)
            if self.test_sets:
                self.world.on_main(f"clear {target}", lambda: remove_unfinished(final))
                encode, tokens = _Encode(engine, stop), self.step.micro_batch_tokens
                for one in self.test_sets:
                    for kind, subfolder, store in one.stores:
                        corpus = Corpus(target / one.name / subfolder, kind)
                        encode_store(
                            store,
                            encode,
                            self.world,
                            corpus,
                            micro_batch_tokens=tokens,
                            is_packed=engine.module.is_packed,
                        )
        finally:
            engine.train()
        # Once more from rank 0, so that no rank decides by a number that differs in its last bit.
        return self.world.on_main(f"measure {target}", lambda: losses | self._retrieve(target, final))

    def _held_out_loss(self, engine: Any, stop: StopRequest) -> dict[str, float]:
        """Mean over all records of the loss, and of whether the positive is first, each in a batch like training's.

        Of scored pairs the rank correlation of cosine and score (Spearman), the mean over their files.
        """
        from scipy.stats import spearmanr

        contrastive = ContrastiveStep(engine, self.store, self.world, self.step, self.seed)
        total = correct = num_queries = 0.0
        pairs: dict[int, list[tuple[float, float]]] = {}  # of each file: cosine and score
        inputs = made_ahead(lambda item: (contrastive.prepare(item[0]), item[1]), self._batches())
        with contextlib.closing(inputs):
            for step_inputs, first_query in inputs:
                leave_if_asked(stop)
                batch = step_inputs.batch
                if batch.scored_groups:
                    alike = zip(contrastive.similarities(step_inputs), batch.pair_scores.tolist())
                    pairs.setdefault(batch.scored_groups[0].file, []).extend(list(alike)[first_query:])
                else:
                    batch_loss, batch_correct = contrastive.evaluate(step_inputs, first_query)
                    total, correct = total + batch_loss, correct + batch_correct
                    num_queries += batch.num_queries - first_query
        spearman = [float(spearmanr(*zip(*of_file)).statistic) for of_file in pairs.values()]
        means = [total / num_queries, correct / num_queries] if num_queries else []
        return dict(zip(self.of_batches, means + [sum(spearman) / len(spearman)] if spearman else means))

    def _batches(self) -> Iterator[tuple[GlobalBatch, int]]:
        """The held-out records as global batches, with the first query of each that has not been in one before.

        The last batch is filled up with records of the one before it, which stand in it only to be scored
        against: so each record is counted once, against as many documents as in training. Where some files hold scored
        pairs, each batch is of one file.
        """
        by_file = self.data.batching == "homogeneous" or any(self.store.kinds_of_files)
        sizes = self.store.file_sizes if by_file else [self.store.num_records]
        for first_record, num_records in zip(np.cumsum([0, *sizes]).tolist(), sizes):
            order = _HeldOutOrder(self.seed, first_record, num_records)
            num_queries = min(self.step.global_batch_size, num_records)
            for start in range(0, num_records, num_queries):
                first_sample = min(start, num_records - num_queries)
                batch = assemble_batch(
                    self.store,
                    order,
                    first_sample=first_sample,
                    num_queries=num_queries,
                    hard_negatives=self.data.hard_negatives,
                    hard_negatives_sampling=self.data.hard_negatives_sampling,
                )
                yield batch, start - first_sample

    def _retrieve(self, target: Path, final: Path) -> dict[str, float]:
        """On rank 0: search with the vectors in `target`, which become `final` or go, and measure."""
        if not self.test_sets:
            return {}
        means: dict[str, float] = {}
        for one in self.test_sets:
            try:
                found = self._search(target / one.name)
            except UserError as error:
                samples = final.name.removeprefix("consumed_samples")
                raise UserError(f"validation after {samples} samples: {error}") from error
            if hint := hint_at_identical(found, one.qrels):
                logger.warning("validation%s: %s", f" on {one.name}" if one.name else "", hint)
            measured = evaluate(found, one.qrels, self.measures).means
            means |= {one.label(measure): value for measure, value in measured.items()}
        if len(self.test_sets) > 1:
            for measure in self.measures:
                means[f"mean/{measure}"] = float(np.mean([means[one.label(measure)] for one in self.test_sets]))
        if self.arguments.val_save_embeddings:
            for one in self.test_sets:
                link_test_doc(target / one.name)
            put_in_place(target, final)
        else:
            remove_unfinished(final)
        return means

    def _search(self, folder: Path) -> SearchRun:
        queries, documents = read_embeddings(folder)
        cutoffs = [measure.params.get("cutoff", 0) for measure in parse_measures(self.measures)]
        depth, ignore = max(_LEAST_DEPTH, *cutoffs), self.arguments.ignore_identical_ids
        scores, indices = search(
            queries.rows,
            documents.rows,
            min(len(documents), depth + ignore),
            tie_rank=documents.ids.ranks,
            device=str(self.world.device),
        )
        if ignore:
            scores, indices = without_identical(queries.ids, documents.ids, scores, indices, depth)
        return SearchRun(queries.ids, documents.ids, scores, indices)


class _Encode:
    """The engine as a corpus is encoded with it, ready to stop before any forward pass."""

    def __init__(self, engine: Any, stop: StopRequest):
        self.engine, self.stop = engine, stop

    def __call__(self, *inputs: Tensor | bool) -> Tensor:
        leave_if_asked(self.stop)
        # What a model caches in inference mode, such as rotary tables, training's graphs could not use.
        with torch.inference_mode(False), torch.no_grad():
            outputs = self.engine(*inputs)
        return outputs[0] if isinstance(outputs, tuple) else outputs  # beside a learned temperature


def leave_if_asked(stop: StopRequest) -> None:
    """Raise StoppedMeanwhile on all ranks when a signal asks for it."""
    if stop.agreed() is not None:
        raise StoppedMeanwhile


def _of_all_files(settings: Any) -> Any:
    """The settings without those of single training files."""
    return replace(settings, **{f.name: [] for f in fields(settings) if f.name.endswith("_per_file")})


def _measures(arguments: ValidationArguments) -> list[str]:
    try:
        return [str(measure) for measure in parse_measures(arguments.val_metrics or DEFAULT_MEASURES)]
    except UserError as error:
        raise UserError(f"--val_metrics: {error}") from None
