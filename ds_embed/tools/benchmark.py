"""Benchmarks in one command: mteb runs on rank 0, and all ranks encode the texts that it requests.

    DIR/results/MODEL/REVISION/TASK.json   in mteb's format, whole or absent; REVISION stands for weights and settings
    DIR/results/MODEL/REVISION/table.md    one table of them

Shapes: n texts, D dimensions.
"""

import logging
import queue
import threading
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, get_args

import mteb
import numpy as np
import orjson
import torch
from datasets import Dataset
from mteb.abstasks.aggregated_task import AbsTaskAggregate
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata, TaskType
from mteb.models.model_meta import ModelMeta
from mteb.results import TaskResult

from ds_embed.artifact.durable import check_writable_folder, hold_lock, replaced_when_whole
from ds_embed.data.files import identify_entries
from ds_embed.data.retrieval_sets import BeirFolder, OurFiles, RetrievalSet
from ds_embed.data.tally import Tally
from ds_embed.data.trec import unique_judgments
from ds_embed.job.ranks import World
from ds_embed.models.loading import find_source
from ds_embed.mteb_model import MTEBModel
from ds_embed.settings import ModelArguments, TextArguments
from ds_embed.settings.errors import UserError
from ds_embed.settings.tool_arguments import BenchmarkArguments
from ds_embed.vectors.embedder import Embedder

_SIDES = ("query", "document")

logger = logging.getLogger(__name__)


def benchmark(world: World, model: ModelArguments, text: TextArguments, arguments: BenchmarkArguments) -> None:
    """Run the tasks that have no result yet, and write the table. Every rank must call it.

    UserError for an unknown task, folder or prompt, data that can't be obtained, or an output folder in use.
    """
    world.set_timeouts(arguments.rank_timeout_seconds, arguments.stall_timeout_seconds)
    tasks: list[Any] = []  # only on rank 0
    world.on_main("find tasks", lambda: tasks.extend(find_tasks(arguments)))
    options = {"device": world.device, "bf16": arguments.bf16, "micro_batch_tokens": arguments.micro_batch_tokens}
    embedder = Embedder.from_source(find_source(model), model, text, world=world, **options)
    if world.is_main:
        logger.info("\n".join(embedder.card.describe(embedder.tokenizer)))
    own = {"prompts": arguments.prompts_by_key, "instruction_template": arguments.instruction_template}
    share_encoding(world, embedder, lambda shared: measure(MTEBModel(shared, **own), tasks, arguments.output_dir))


def find_tasks(arguments: BenchmarkArguments) -> list[Any]:
    """mteb's tasks, in the order requested. UserError with the nearest name for an unknown one."""
    tasks: list[Any] = []
    for name in arguments.tasks:
        if Path(name).is_dir():
            folder = Path(name).expanduser().resolve()
            records = BeirFolder(folder, arguments.split, Tally(), join_titles=True)
            paths = [path for path in sorted(folder.glob("*.*")) if path.is_file()]
            paths.append(folder / "qrels" / f"{arguments.split}.tsv")
            tasks.append(_own_task(folder.name, records, paths, arguments))
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tasks += _named(name)
    if arguments.query_files:
        records = OurFiles(arguments.query_files, arguments.doc_files, arguments.qrels)
        paths = [*arguments.query_files, *arguments.doc_files, *filter(None, [arguments.qrels])]
        tasks.append(_own_task(arguments.task_name, records, paths, arguments))
    names = [task.metadata.name for task in tasks]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise UserError(f"--tasks: two tasks are called {repeated[0]}; rename a folder, or set --task_name")
    _check_prompts(arguments, tasks)
    return tasks


def _named(name: str) -> list[Any]:
    if "/" in name:
        raise UserError(f"--tasks {name}: no such folder")
    problems = []
    for find in (lambda: [mteb.get_task(name)], lambda: list(mteb.get_benchmark(name).tasks)):
        try:
            return find()
        except KeyError as error:
            problems.append(str(error.args[0]).removeprefix("KeyError: "))
    raise UserError(f"--tasks {name}: is not a folder, and of mteb's tasks and benchmarks: {'; '.join(problems)}")


def _check_prompts(arguments: BenchmarkArguments, tasks: list[Any]) -> None:
    """UserError for a prompt that no task would use."""
    known = {*_SIDES, *get_args(TaskType)} | {task.metadata.name for task in tasks}
    for key in arguments.prompts_by_key:
        name, _, side = key.rpartition("-")
        if key not in known and not (name in known and side in _SIDES):
            raise UserError(
                f"--prompts {key}=...: is neither one of the tasks nor a type of mteb's, alone or with -query or "
                f"-document behind it; types are {', '.join(get_args(TaskType))}"
            )


def _own_task(name: str, records: RetrievalSet, paths: Iterable[Any], arguments: BenchmarkArguments) -> Any:
    class Own(_OwnTask):
        metadata = TaskMetadata(
            name=name,
            description="queries, documents and judgments in files",
            type="Retrieval",
            main_score="ndcg_at_10",
            dataset={"path": "files", "revision": identify_entries(paths)},
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
        )
        ignore_identical_ids = arguments.ignore_identical_ids

    task = Own()
    task.records = records
    return task


class _OwnTask(AbsTaskRetrieval):
    """A retrieval task from files. UserError naming file and line for unusable records."""

    records: RetrievalSet

    def load_data(self, *_: Any, **unused: Any) -> None:
        documents = [{"id": one.doc_id, "text": one.pos_doc} for _, one in self.records.documents()]
        queries: dict[str, str] = {}
        for where, query in self.records.queries():
            if query.prompt is not None:
                raise UserError(
                    f"{where}: brings a prompt of its own, and mteb encodes all queries of a task behind one; remove it, or "
                    "measure with generate and evaluate"
                )
            queries[query.query_id] = query.query
        right: dict[str, dict[str, int]] = {}
        ids = {one["id"] for one in documents}
        for where, judgment in unique_judgments(self.records.judgments()):
            for what, name, known in (("query", judgment.query_id, queries), ("document", judgment.doc_id, ids)):
                if name not in known and (what == "query" or judgment.relevance > 0):
                    raise UserError(f"{where}: {what} '{name}' is not among the texts, so it can't be found")
            right.setdefault(judgment.query_id, {})[judgment.doc_id] = judgment.relevance
        if not any(relevance > 0 for judged in right.values() for relevance in judged.values()):
            raise UserError(f"{self.metadata.name}: no document is judged relevant, so there is nothing to measure")
        asked = [{"id": name, "text": text} for name, text in queries.items()]
        parts = {"queries": Dataset.from_list(asked), "corpus": Dataset.from_list(documents), "relevant_docs": right}
        self.dataset = {"default": {"test": parts | {"top_ranked": None}}}
        self.data_loaded = True


class _Results(mteb.ResultCache):
    """mteb's folder of results, with files that are whole or absent."""

    def save_to_cache(self, task_result: TaskResult, model_name: ModelMeta, *_: Any, **unused: Any) -> None:
        path = self.get_task_result_path(task_result.task_name, model_name)
        with replaced_when_whole(path, binary=True) as file:
            task_result.to_disk(Path(file.name))
        with replaced_when_whole(path.with_name("model_meta.json"), binary=True) as file:
            file.write(orjson.dumps(model_name.to_dict(), default=str, option=orjson.OPT_INDENT_2))


def measure(model: MTEBModel, tasks: list[Any], output_dir: str) -> Path:
    """Write the results of all tasks to `output_dir`, reusing existing ones; return the table's path."""
    folder = Path(output_dir).expanduser().resolve()
    check_writable_folder("--output_dir", folder)
    lock = hold_lock(folder, "--output_dir", inside=True)
    results, meta, rows = _Results(folder), model.mteb_model_meta, []
    for task in tasks:
        name, revision = task.metadata.name, task.metadata.dataset.get("revision")
        old = results.load_task_result(name, meta)
        is_other = old is not None and old.dataset_revision != revision and not isinstance(task, AbsTaskAggregate)
        if is_other:
            logger.warning("warning: %s: its data set has changed since it was measured; it is measured anew", name)
        if old is not None and not is_other and not old.get_missing_evaluations(task):
            logger.info("%s: measured before", name)
        else:
            _load(task)
            strategy = "always" if is_other else "only-missing"
            logger.info("%s: measuring", name)
            options = {"overwrite_strategy": strategy, "show_progress_bar": False, "co2_tracker": False}
            old = mteb.evaluate(model, task, cache=results, **options).task_results[0]
            if not isinstance(task, AbsTaskAggregate):
                task.unload_data()
        rows.append((name, task.metadata.type, task.metadata.main_score, old.get_score()))
    table = _table(rows)
    path = results.get_task_result_path("table", meta).with_suffix(".md")
    with replaced_when_whole(path) as file:
        file.write(table)
    print(f"{meta.name}\n\n{table}\nwritten to {path}", flush=True)
    if lock is not None:
        lock.close()
    return path


def _load(task: Any) -> None:
    if isinstance(task, AbsTaskAggregate):
        return
    try:
        task.load_data()
    except UserError:
        raise
    except OSError as error:  # from `datasets`: not found, no network, no permission
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"--tasks {task.metadata.name}: its data set {task.metadata.dataset['path']} could not be had: {reason}"
        ) from None


def _table(rows: list[tuple[str, str, str, float]]) -> str:
    """A Markdown table of each task's main score and the means over each type and over all tasks, in percent."""
    lines = ["| task | type | measure | score |", "|---|---|---|---|"]
    lines += [f"| {name} | {kind} | {measure} | {100 * score:.2f} |" for name, kind, measure, score in rows]
    kinds = {kind: [score for _, other, _, score in rows if other == kind] for _, kind, _, _ in rows}
    groups = list(kinds.items()) if len(kinds) > 1 else []
    for kind, scores in [*groups, ("all", [score for *_, score in rows])]:
        if len(scores) > 1:
            lines.append(f"| mean of {len(scores)} | {kind} | | {100 * sum(scores) / len(scores):.2f} |")
    return "\n".join(lines) + "\n"


class _Shared:
    """An Embedder for use in another thread: all ranks compute what it is asked for."""

    def __init__(self, embedder: Embedder, ask: Callable[[list[str], str, str | None], np.ndarray]):
        self._embedder, self._ask = embedder, ask

    def __getattr__(self, name: str) -> Any:
        return getattr(self._embedder, name)

    def encode_queries(self, texts: list[str], *, prefix: str | None = None) -> np.ndarray:
        return self._ask(texts, "encode_queries", prefix)

    def encode_documents(self, texts: list[str], *, prefix: str | None = None) -> np.ndarray:
        return self._ask(texts, "encode_documents", prefix)


def share_encoding(world: World, embedder: Embedder, work: Callable[[Any], object]) -> None:
    """Run work(embedder) in a thread on rank 0, while all ranks encode the texts that it requests.

    Every rank must call it; an exception in `work` is raised here.
    """
    asked: queue.SimpleQueue = queue.SimpleQueue()
    answers: queue.SimpleQueue = queue.SimpleQueue()

    def ask(*request: Any) -> np.ndarray:
        asked.put(request)
        return answers.get()

    def run() -> None:
        try:
            work(_Shared(embedder, ask))
            asked.put(None)
        except BaseException as error:
            asked.put(error)

    if world.is_main:
        threading.Thread(target=run, daemon=True, name="benchmark").start()
    texts: list[str] = []

    def following() -> tuple[str, str | None, int] | None:
        nonlocal texts
        request = asked.get()
        if isinstance(request, BaseException):
            raise request
        if request is None:
            return None
        texts, method, prefix = request
        return method, prefix, len(orjson.dumps(texts)) if world.size > 1 else 0

    while (request := world.on_main("measure", following)) is not None:
        method, prefix, num_bytes = request
        if world.size > 1:
            texts = _broadcast(world, texts, num_bytes)
        vectors = getattr(embedder, method)(texts, prefix=prefix, progress=world.is_main)
        if world.is_main:
            answers.put(vectors)


def _broadcast(world: World, texts: list[str], num_bytes: int) -> list[str]:
    """Rank 0's texts on every rank."""
    content = torch.empty(num_bytes, dtype=torch.uint8, device=world.device)
    if world.is_main:
        content.copy_(torch.frombuffer(bytearray(orjson.dumps(texts)), dtype=torch.uint8))
    return orjson.loads(world.broadcast(content).cpu().numpy().tobytes())
