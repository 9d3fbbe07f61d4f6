"""Search a corpus encoded by recipes/generate.py with a query from the command line.

    python recipes/search.py "how do I sort a list" --model_name_or_path RUN \
        --embeddings OUT/consumed_samplesX --doc_files docs.jsonl
"""

import sys
from dataclasses import dataclass

from ds_embed.job.ranks import run_recipe
from ds_embed.settings import ModelArguments, TextArguments, parse_arguments
from ds_embed.settings.errors import UserError
from ds_embed.settings.fields import Settings, setting, several
from ds_embed.settings.tool_arguments import SearchIndexArguments


@dataclass
class SearchArguments(Settings):
    query: str = setting("the text to search for; as the first argument it needs no flag")
    embeddings: str = setting("folder OUT/consumed_samplesX with test_docs/")
    doc_files: list[str] = several("files that the documents came from, to show their texts", files=True)
    top_k: int = setting("number of documents shown", 5, above=0)
    show_characters: int = setting("characters of each document shown", 300, above=0)
    bf16: bool = setting("encode the query in bfloat16, as generate does by default", True)

    def __post_init__(self):
        super().__post_init__()
        if not self.query.strip():
            raise UserError("--query: is empty; give the text to search for")


def main() -> None:
    argv = sys.argv[1:]
    if argv and not argv[0].startswith("-"):
        argv = ["--query", *argv]
    model, text, arguments, index = parse_arguments(
        ModelArguments, TextArguments, SearchArguments, SearchIndexArguments, argv=argv
    )
    from ds_embed.data.records import read_document_texts
    from ds_embed.models.loading import find_source
    from ds_embed.vectors.embedder import Embedder
    from ds_embed.vectors.faiss_index import search_by_arguments
    from ds_embed.vectors.load import identify_with_card
    from ds_embed.vectors.vectors import other_model, read_vectors

    documents = read_vectors(arguments.embeddings, "doc")
    source = find_source(model)
    embedder = Embedder.from_source(source, model, text, device=None, bf16=arguments.bf16)
    if documents.made_from:
        if other := other_model(documents, identify_with_card(source, embedder.card, model.trust_remote_code)):
            print(
                f"warning: the vectors of {arguments.embeddings} come from another model than "
                f"{model.model_name_or_path} ({other}): unless one is an export of the other, what is found means nothing",
                file=sys.stderr,
            )
    query = embedder.encode_queries([arguments.query])
    top_k = min(arguments.top_k, len(documents))
    scores, rows, _ = search_by_arguments(index, query, documents.rows, top_k, tie_rank=documents.ids.ranks)
    ids = [documents.ids[row] for row in rows[0] if row >= 0]
    texts = read_document_texts(arguments.doc_files, set(ids)) if arguments.doc_files else {}
    if arguments.doc_files and (unknown := [name for name in ids if name not in texts]):
        raise UserError(
            f"--doc_files: have no document '{unknown[0]}'; give the files that {arguments.embeddings} encoded"
        )
    print(f'query: "{arguments.query}"')
    for place, (name, score) in enumerate(zip(ids, scores[0]), start=1):
        print(f"\n{place}. {name}  (cosine {score:.3f})")
        if name in texts:
            shown = texts[name][: arguments.show_characters]
            print("   " + shown.replace("\n", "\n   ") + (" ..." if len(shown) < len(texts[name]) else ""))


if __name__ == "__main__":
    raise SystemExit(run_recipe(main))
