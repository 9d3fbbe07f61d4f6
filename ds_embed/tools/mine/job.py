"""The mining job: training files in, the same records with hard negatives out.

    catalog   rank 0 lists the distinct queries and documents
    vectors   all ranks encode them (or BM25 indexes the documents)
    chunks    for each chunk of queries: all ranks search, score with the cross-encoder, apply the rules
    output    rank 0 writes the records with their negatives

Chunks do not depend on the number of ranks. Each part is kept in the work folder as soon as it is complete.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ds_embed.artifact.durable import remove_unfinished, replaced_when_whole
from ds_embed.artifact.identity import check_unchanged, identify_large
from ds_embed.artifact.work import WorkFolder
from ds_embed.data.files import identify_entries
from ds_embed.data.identity import ranges
from ds_embed.data.tokenize import TextTokenizer
from ds_embed.job.ranks import World
from ds_embed.models.loading import choose_card, find_source, load_tokenizer
from ds_embed.models.reranker import identify_reranker
from ds_embed.settings import ModelArguments, TextArguments
from ds_embed.settings.errors import UserError
from ds_embed.settings.tool_arguments import MiningArguments
from ds_embed.tools.mine.catalog import Catalog, CatalogBuilder
from ds_embed.tools.mine.output import Mined, describe, plot_path, plot_scores, summarise, summary_path, write_records
from ds_embed.tools.mine.rules import RULES, Pool, choose, make_pool

logger = logging.getLogger(__name__)

KIND = "the work of mining, form 4"
_PLACES = ("output_file", "work_dir")  # these do not affect the output
CHUNK_QUERIES = 1024
SCORED_CHUNK_QUERIES = 64  # a cross-encoder takes seconds for these, so an interrupted chunk costs little
_RECORDS_AT_ONCE = 4096
_FOUND_AT_ONCE = 1 << 24  # scores of found documents


def mine(world: World, model: ModelArguments, text: TextArguments, arguments: MiningArguments) -> None:
    """Write output_file, its .summary.json and its .scores.png. Every rank must call it.

    UserError if inputs do not match each other, or changed since the job was begun.
    """
    arguments.check_model(model, text)
    output_file = Path(arguments.output_file).expanduser().resolve()
    work_dir = Path(arguments.work_dir or f"{output_file}.work").expanduser().resolve()
    inputs = world.on_main("mining: what decides the output", lambda: _describe_inputs(model, text, arguments))
    work = WorkFolder(work_dir, KIND, "--work_dir", inputs)
    if not world.on_main("mining: begin", lambda: _begin(work, output_file)):
        return
    folder = world.on_main(
        "mining: catalog",
        lambda: work.obtain("catalog", lambda path: CatalogBuilder(path, arguments, _tokenizers(model, text)).build()),
    )
    catalog = Catalog.open(folder)
    _check_sizes(catalog, arguments)
    source = _candidates(world, work, catalog, model, text, arguments)
    _mine_chunks(world, work, catalog, source, arguments)

    def finish() -> None:
        mined = _collect(work, catalog, arguments)
        summary = summarise(mined, catalog, arguments, json.loads((folder / "catalog.json").read_text()))
        unit = {"bm25": "BM25"}.get(arguments.method, "cosine")
        plot_scores(output_file, mined, "score of the cross-encoder" if arguments.cross_encoder else unit)
        with replaced_when_whole(summary_path(output_file)) as file:
            json.dump(summary | {"inputs": inputs}, file, indent=2)
            file.write("\n")
        write_records(output_file, mined, catalog, arguments)
        work.remove()
        print("\n".join(describe(summary, arguments)))
        print(f"written to {output_file}, all numbers to {summary_path(output_file).name}")
        if without := summary["records_without_negatives"]:
            rule, count = max(summary["dropped"].items(), key=lambda item: (item[0] != "positive", item[1]))
            end = "left out" if arguments.drop_without_negatives else "written without one"
            logger.warning(
                "warning: %s of %s records have no negative and were %s; the rule %s took %s of %s candidates",
                *(f"{without:,}", f"{summary['records']:,}", end, rule),
                *(f"{count:,}", f"{summary['candidates_considered']:,}"),
            )

    world.on_main("mining: output", finish)


def _describe_inputs(model: ModelArguments, text: TextArguments, arguments: MiningArguments) -> dict[str, str]:
    """Everything that determines the output, by the name of its flag if it has one."""
    settings = {**asdict(model), **asdict(text), **asdict(arguments)}
    inputs = {name: str(value) for name, value in settings.items() if name not in _PLACES}
    for name in ("train_files", "doc_files", "corpus_files"):
        inputs[name] = identify_entries(settings[name])
    if arguments.embeddings is not None:
        inputs["embeddings"] = identify_large(Path(arguments.embeddings).resolve().rglob("*.npy"))
    if model.model_name_or_path:
        inputs |= find_source(model).identify(None)
    if arguments.cross_encoder is not None:
        inputs["cross_encoder"] = identify_reranker(arguments.cross_encoder, "cross_encoder")
    return inputs


def _tokenizers(model: ModelArguments, text: TextArguments) -> tuple[TextTokenizer, ...] | None:
    """The tokenizers of queries and documents; None without a model."""
    if not model.model_name_or_path:
        return None
    source = find_source(model)
    formats = choose_card(source, text, model).text_formats()
    tokenizer = load_tokenizer(source, model.trust_remote_code)
    settings = ("query_max_length", "doc_max_length")
    return tuple(TextTokenizer(tokenizer, one, setting) for one, setting in zip(formats, settings))


def _begin(work: WorkFolder, output_file: Path) -> bool:
    """Prepare the work folder. False if the output of these inputs already exists, so there is nothing to do."""
    if output_file.exists():
        summary = summary_path(output_file)
        before = json.loads(summary.read_text(encoding="utf-8")).get("inputs") if summary.exists() else None
        if before is None:
            raise UserError(f"--output_file {output_file}: exists and was not mined; choose another name")
        check_unchanged(output_file, before, work.made_from, (), "--output_file")
        logger.info("%s exists, mined from the same inputs", output_file)
        if not work.path.exists() or work.open():  # the earlier job was killed before it cleaned up
            work.remove()
        return False
    output_file.parent.mkdir(parents=True, exist_ok=True)
    if work.open():
        logger.info("going on with what %s holds", work.path)
    for path in (output_file, summary_path(output_file), plot_path(output_file)):
        remove_unfinished(path)
    return True


def _check_sizes(catalog: Catalog, arguments: MiningArguments) -> None:
    if arguments.num_negatives + arguments.range_min >= catalog.num_candidates:
        raise UserError(
            f"--num_negatives {arguments.num_negatives}, --range_min {arguments.range_min}: there are only "
            f"{catalog.num_candidates} documents to choose from, a positive among them; lower them or add --doc_files"
        )
    if arguments.range_max is not None and arguments.range_max > catalog.num_candidates:
        raise UserError(
            f"--range_max {arguments.range_max}: there are only {catalog.num_candidates} documents to choose from; lower it"
        )


def _candidates(
    world: World,
    work: WorkFolder,
    catalog: Catalog,
    model: ModelArguments,
    text: TextArguments,
    arguments: MiningArguments,
) -> Any:
    """The object that finds a query's candidates: a ModelCandidates, or Bm25Candidates with the same methods."""
    if arguments.method == "bm25":
        from ds_embed.tools.mine.bm25 import Bm25Candidates, build_bm25

        folder = world.on_main(
            "mining: bm25",
            lambda: work.obtain(
                "bm25", lambda path: build_bm25(catalog.documents, path, arguments.bm25_k1, arguments.bm25_b)
            ),
        )
        return Bm25Candidates(world, catalog, folder)
    from ds_embed.tools.mine.candidates import ModelCandidates, obtain_vectors

    return ModelCandidates(world, catalog, obtain_vectors(world, work.path, model, text, arguments))


def _mine_chunks(world: World, work: WorkFolder, catalog: Catalog, source: Any, arguments: MiningArguments) -> None:
    size = _chunk_size(arguments)
    num_chunks = -(-len(catalog.queries) // size)
    missing = world.on_main("mining: chunks", lambda: work.missing_chunks(num_chunks))
    if not missing:
        return
    scorer = None
    if arguments.cross_encoder is not None:
        from ds_embed.vectors.cross_encoder import CrossEncoder

        scorer = CrossEncoder(
            world,
            arguments.cross_encoder,
            max_length=arguments.cross_encoder_max_length,
            template=arguments.cross_encoder_template,
            bf16=arguments.cross_encoder_bf16,
            probability=arguments.cross_encoder_scores == "probability",
            micro_batch_tokens=arguments.micro_batch_tokens,
        )
    by_query = np.argsort(catalog.record_queries, kind="stable")
    sorted_queries = catalog.record_queries[by_query]
    shown: dict[str, Any] = {"unit": "chunk", "desc": "mining", "dynamic_ncols": True, "disable": not world.is_main}
    for number in tqdm(missing, total=num_chunks, initial=num_chunks - len(missing), **shown):
        queries = range(number * size, min((number + 1) * size, len(catalog.queries)))
        records = by_query[slice(*np.searchsorted(sorted_queries, [queries.start, queries.stop]))]
        found = _mine_chunk(catalog, source, scorer, queries, records, arguments)
        world.on_main(f"mining: chunk {number}", lambda: work.write_chunk(number, **found))


def _mine_chunk(
    catalog: Catalog, source: Any, scorer: Any, queries: range, records: np.ndarray, arguments: MiningArguments
) -> dict[str, np.ndarray]:
    """Mine the negatives of all records of these queries; the result is the same on every rank."""
    query_rows = np.arange(queries.start, queries.stop)
    groups = catalog.groups[query_rows]
    places = catalog.record_queries[records] - queries.start
    # Pairs, besides the candidates, whose scores are needed: positives, and existing negatives that are kept.
    owners, existing_rows = catalog.existing.of(records)
    pairs = np.concatenate(
        [np.stack(catalog.positives.of(groups), axis=1), np.stack([places[owners], existing_rows], axis=1)]
    )
    pairs = np.unique(pairs, axis=0)  # sorted by query, then document
    pool, pair_scores = _find(catalog, source, queries, groups, pairs, arguments)
    if scorer is not None:
        place, column = np.nonzero(pool.rows >= 0)
        all_places, all_rows = np.append(pairs[:, 0], place), np.append(pairs[:, 1], pool.rows[place, column])
        new = scorer.score(_Pairs(catalog, query_rows[all_places], all_rows))
        pair_scores, pool_scores = new[: len(pairs)], np.full(pool.rows.shape, -np.inf, dtype=np.float32)
        pool_scores[place, column] = new[len(pairs) :]
        pool = pool.reordered(pool_scores)

    def scores_of(places: np.ndarray, rows: np.ndarray) -> np.ndarray:
        stride = len(catalog.documents)
        return pair_scores[np.searchsorted(pairs[:, 0] * stride + pairs[:, 1], places * stride + rows)]

    positive_places, positive_rows = catalog.positives.of(groups)
    lowest = np.full(len(queries), np.inf, dtype=np.float32)
    np.minimum.at(lowest, positive_places, scores_of(positive_places, positive_rows))
    chosen = [
        choose(pool, lowest, places[block], records[block], catalog.existing, arguments)
        for block in (slice(i, i + _RECORDS_AT_ONCE) for i in range(0, len(records), _RECORDS_AT_ONCE))
    ]
    return {
        "records": records,
        "rows": np.concatenate([rows for rows, _, _ in chosen]),
        "scores": np.concatenate([scores for _, scores, _ in chosen]),
        "positive_scores": scores_of(places, catalog.record_positives[records]),
        "existing_scores": scores_of(places[owners], existing_rows),
        "num_dropped": sum(counts for _, _, counts in chosen),
        "num_candidates": (pool.rows >= 0).sum(axis=1)[places].sum() + pool.num_positives[places].sum(),
    }


@dataclass(frozen=True)
class _Pairs(Sequence):
    """The texts of pairs of rows, read on demand."""

    catalog: Catalog
    queries: np.ndarray
    documents: np.ndarray

    def __len__(self) -> int:
        return len(self.queries)

    def __getitem__(self, place: Any) -> tuple[str, str]:
        return self.catalog.queries[self.queries[place]], self.catalog.documents[self.documents[place]]


def _find(
    catalog: Catalog, source: Any, queries: range, groups: np.ndarray, pairs: np.ndarray, arguments: MiningArguments
) -> tuple[Pool, np.ndarray]:
    """The pools of the queries, and the scores of the sorted `pairs` (index within `queries`, document)."""
    wanted = min(arguments.num_candidates, catalog.num_candidates)
    depth = min(catalog.num_candidates, wanted + int(catalog.excluded.counts(groups).max()))
    # A query with very many positives needs a very deep search, so process few queries at a time.
    step = max(1, _FOUND_AT_ONCE // depth)
    pools, scores_of_pairs = [], []
    for low in range(0, len(queries), step):
        block = queries[low : low + step]
        of_block = pairs[slice(*np.searchsorted(pairs[:, 0], [low, low + len(block)]))]
        scores, rows, pair_scores = source.find(block, depth, of_block[:, 0] - low, of_block[:, 1])
        pools.append(make_pool(scores, rows, catalog.excluded, groups[low : low + len(block)], wanted))
        scores_of_pairs.append(pair_scores)
    together = [np.concatenate(parts) for parts in zip(*((p.rows, p.scores, p.num_positives) for p in pools))]
    return Pool(*together), np.concatenate(scores_of_pairs)


def _collect(work: WorkFolder, catalog: Catalog, arguments: MiningArguments) -> Mined:
    num_records = len(catalog.record_queries)
    shape = (num_records, arguments.num_negatives)
    rows, scores = np.empty(shape, dtype=np.int64), np.empty(shape, dtype=np.float32)
    positive_scores = np.empty(num_records, dtype=np.float32)
    existing_scores = np.empty(len(catalog.existing.values), dtype=np.float32)
    num_dropped, num_candidates = np.zeros(len(RULES), dtype=np.int64), 0
    for number in range(-(-len(catalog.queries) // _chunk_size(arguments))):
        with np.load(work.chunk_path(number), allow_pickle=False) as part:
            records = part["records"]
            rows[records], scores[records] = part["rows"], part["scores"]
            positive_scores[records] = part["positive_scores"]
            existing = ranges(catalog.existing.first[records], catalog.existing.counts(records))
            existing_scores[existing] = part["existing_scores"]
            num_dropped += part["num_dropped"]
            num_candidates += int(part["num_candidates"])
    return Mined(rows, scores, positive_scores, existing_scores, num_dropped, num_candidates)


def _chunk_size(arguments: MiningArguments) -> int:
    return CHUNK_QUERIES if arguments.cross_encoder is None else SCORED_CHUNK_QUERIES
