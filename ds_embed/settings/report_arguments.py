"""A report of a run."""

from dataclasses import dataclass

from ds_embed.settings.fields import Settings, setting


@dataclass
class ReportArguments(Settings):
    """What to report, and from which vectors. Without vectors the page shows only the curves."""

    run: str = setting("the --output_dir of a training run, finished or not; as the first argument it needs no flag")
    output_dir: str | None = setting("folder for report.html and the charts (default: RUN/report)", default=None)
    compare: str | None = setting("another run, whose curves are drawn in the same charts", default=None)
    embeddings: str | None = setting(
        "folder OUT/consumed_samplesX with test_queries and test_docs (default: the newest in RUN/validation)",
        default=None,
    )
    query_files: list[str] = setting(
        "query texts and, without --qrels, their relevant documents (default: the run's val_query_files)",
        default_factory=list,
        files=True,
    )
    doc_files: list[str] = setting(
        "document texts (default: the run's val_doc_files)", default_factory=list, files=True
    )
    qrels: str | None = setting(
        "judgments: a TREC qrels file, a BEIR tsv, or JSON lines with query_id, doc_id and score", default=None
    )
    ignore_identical_ids: bool | None = setting(
        "ignore the document that has the same id as the query (default: as in the run's validation)", default=None
    )
    worst_queries: int = setting("number of failed queries shown with their texts", default=20, at_least=0)
    show_characters: int = setting("characters of each text shown", default=300, above=0)
    map: str = setting(
        "projection of the documents to two dimensions: pca, or tsne (needs scikit-learn)",
        default="pca",
        choices=("pca", "tsne"),
    )
    map_documents: int = setting("maximum number of documents on the map, sampled at random", default=2000, at_least=3)
    seed: int = setting("seed of the random samples", default=42, at_least=0)
