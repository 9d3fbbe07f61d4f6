"""The rerank job: sorts the best documents of each query in a run by a reranker's scores.

    OUTPUT.work/chunk_XXXXXX.npz    scores of the pairs of a chunk of queries; removed at the end

Shapes: n queries, k documents per query.
"""

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ds_embed.artifact.durable import replaced_when_whole
from ds_embed.artifact.identity import identify_large
from ds_embed.artifact.work import WorkFolder
from ds_embed.data.files import identify_entries
from ds_embed.data.records import read_document_texts, read_query_texts
from ds_embed.job.ranks import World
from ds_embed.models.reranker import identify_reranker
from ds_embed.settings.errors import UserError
from ds_embed.settings.tool_arguments import RerankArguments
from ds_embed.vectors.cross_encoder import CrossEncoder
from ds_embed.vectors.metrics import SearchRun, load_run, rank_documents, write_run_lines
from ds_embed.vectors.search import search
from ds_embed.vectors.vectors import read_embeddings

KIND = "the work of reranking, form 2"
CHUNK_QUERIES = 64

logger = logging.getLogger(__name__)

Candidates = list[tuple[str, list[str]]]


def rerank(world: World, arguments: RerankArguments) -> None:
    """Write output_file, a TREC run. Every rank must call it. After a kill, the same command continues.

    UserError for ids without a text, inputs that changed since the job was begun, or an output that already exists.
    """
    world.set_timeouts(arguments.rank_timeout_seconds, arguments.stall_timeout_seconds)
    output = Path(arguments.output_file).expanduser().resolve()
    made_from = world.on_main("rerank: what decides the output", lambda: _made_from(output, arguments))
    work = WorkFolder(output.with_name(f"{output.name}.work"), KIND, "--output_file", made_from)
    # What is wrong with the inputs shows before the work is begun: mended, they would be other inputs than it was begun with.
    candidates = world.on_main("rerank: candidates", lambda: _candidates(arguments))
    texts = _texts(arguments, candidates)
    scorer = CrossEncoder(
        world,
        arguments.model_name_or_path,
        flag="model_name_or_path",
        prefix="",
        max_length=arguments.max_length,
        template=arguments.template,
        bf16=arguments.bf16,
        micro_batch_tokens=arguments.micro_batch_tokens,
    )
    if world.on_main("rerank: begin", work.open) and world.is_main:
        logger.info("going on with what %s holds", work.path)
    chunks = [candidates[start : start + CHUNK_QUERIES] for start in range(0, len(candidates), CHUNK_QUERIES)]
    missing = world.on_main("rerank: chunks", lambda: work.missing_chunks(len(chunks)))
    for number in missing:
        pairs = [(texts[0][query], texts[1][name]) for query, names in chunks[number] for name in names]
        scores = scorer.score(pairs)
        world.on_main(f"rerank: chunk {number}", lambda: work.write_chunk(number, scores=scores))
        if world.is_main:
            logger.info("scored %d of %d chunks of %d queries", number + 1, len(chunks), CHUNK_QUERIES)

    def finish() -> None:
        run: dict[str, dict[str, float]] = {}
        for number, chunk in enumerate(chunks):
            scores = iter(np.load(work.chunk_path(number), allow_pickle=False)["scores"].tolist())
            run |= {query: {name: next(scores) for name in names} for query, names in chunk}
        with replaced_when_whole(output) as file:
            write_run_lines(file, run, tag="ds_embed_rerank")
        work.remove()
        print(f"{len(run):,} queries, reranked, written to {output}")

    world.on_main("rerank: output", finish)


def _made_from(output: Path, arguments: RerankArguments) -> dict[str, str]:
    if output.exists():
        raise UserError(f"--output_file {output}: exists; remove it, or choose another name")
    settings = asdict(arguments)
    made_from = {
        name: str(settings[name]) for name in ("top_k", "max_length", "template", "bf16", "micro_batch_tokens")
    }
    made_from["model"] = identify_reranker(arguments.model_name_or_path, "model_name_or_path")
    made_from |= {name: identify_entries(settings[name]) for name in ("query_files", "doc_files")}
    if arguments.run_file is not None:
        return made_from | {"run_file": identify_entries([arguments.run_file])}
    assert arguments.embeddings is not None
    return made_from | {"embeddings": identify_large(Path(arguments.embeddings).resolve().rglob("*.npy"))}


def _candidates(arguments: RerankArguments) -> Candidates:
    """The top_k best documents of each query, best first, from the run file or from exact search."""
    if arguments.run_file is not None:
        run: Any = load_run(arguments.run_file)
    else:
        assert arguments.embeddings is not None
        queries, documents = read_embeddings(arguments.embeddings)
        depth = min(arguments.top_k, len(documents))
        run = SearchRun(
            queries.ids, documents.ids, *search(queries.rows, documents.rows, depth, tie_rank=documents.ids.ranks)
        )
    return [(query, [name for name, _ in rank_documents(found)[: arguments.top_k]]) for query, found in run.items()]


def _texts(arguments: RerankArguments, candidates: Candidates) -> tuple[dict[str, str], dict[str, str]]:
    wanted = {query for query, _ in candidates}, {name for _, names in candidates for name in names}
    found = read_query_texts(arguments.query_files, wanted[0]), read_document_texts(arguments.doc_files, wanted[1])
    for flag, ids, texts in zip(("query_files", "doc_files"), wanted, found):
        if missing := sorted(ids - texts.keys()):
            raise UserError(
                f"--{flag}: {len(missing):,} of the {len(ids):,} ids to rerank have no text there, such as '{missing[0]}'"
            )
    return found
