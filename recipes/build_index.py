"""Build a FAISS index of documents encoded by recipes/generate.py, in a file that faiss.read_index reads.

    python recipes/build_index.py --embeddings OUT/consumed_samplesX --index hnsw --output_file OUT/docs.faiss

Row i of the index is line i of test_docs/doc.ids. Scores are inner products. recipes/evaluate.py and
recipes/search.py read the file with --index_file.
"""

import os
import time
from dataclasses import dataclass

from ds_embed.job.ranks import run_recipe
from ds_embed.settings import parse_arguments
from ds_embed.settings.fields import setting
from ds_embed.settings.tool_arguments import INDEX_KINDS, IndexArguments
from ds_embed.vectors.vectors import read_vectors


@dataclass(kw_only=True)
class BuildIndexArguments(IndexArguments):
    embeddings: str = setting("folder OUT/consumed_samplesX with test_docs/")
    output_file: str = setting("file to write the index to")
    index: str = setting(f"kind of index: {', '.join(INDEX_KINDS)}", "hnsw", choices=INDEX_KINDS)


def main(argv=None):
    (arguments,) = parse_arguments(BuildIndexArguments, argv=argv)
    documents = read_vectors(arguments.embeddings, "doc")
    from ds_embed.vectors.faiss_index import build_index, index_kind, read_index, write_index

    start = time.perf_counter()
    index = build_index(arguments.index, documents.rows, arguments)
    write_index(index, arguments.output_file)
    read_index(arguments.output_file, documents.rows)
    size = os.path.getsize(arguments.output_file) / 2**20
    print(f"documents  {len(documents)}, vectors of {documents.rows.shape[1]} dimensions")
    print(f"index      {index_kind(index)}, built in {time.perf_counter() - start:.1f} seconds")
    print(f"written to {arguments.output_file}, {size:.1f} MiB")


if __name__ == "__main__":
    raise SystemExit(run_recipe(main))
