"""Reranking what a search found."""

from dataclasses import dataclass

from ds_embed.settings.errors import UserError
from ds_embed.settings.fields import setting
from ds_embed.settings.job_arguments import JobArguments


@dataclass(kw_only=True)
class RerankArguments(JobArguments):
    model_name_or_path: str = setting(
        "run of recipes/train_reranker.py, or folder or hub name of a sequence classifier with 1 or 2 labels"
    )
    run_file: str | None = setting("TREC run file whose documents are reranked", default=None)
    embeddings: str | None = setting(
        "folder OUT/consumed_samplesX written by recipes/generate.py; exact search in it gives the documents to rerank, "
        "instead of run_file",
        default=None,
    )
    query_files: list[str] = setting("files with the texts of the queries", files=True)
    doc_files: list[str] = setting("files with the texts of the documents", files=True)
    output_file: str = setting("TREC run file to write; must not exist")
    top_k: int = setting("number of documents per query to rerank and write", default=100, above=0)
    max_length: int | None = setting(
        "maximum pair length in tokens (default: as in training, else what the model supports, at most 512)",
        default=None,
        above=0,
    )
    bf16: bool = setting(
        "compute in bfloat16, which gives scores of about 3 digits; false computes in float32", default=False
    )
    micro_batch_tokens: int = setting(
        "padded tokens per forward pass of one rank; determines memory use", default=16384, above=0
    )

    def __post_init__(self):
        super().__post_init__()
        if (self.run_file is None) == (self.embeddings is None):
            raise UserError("give either --run_file or --embeddings, to say what is reranked")
