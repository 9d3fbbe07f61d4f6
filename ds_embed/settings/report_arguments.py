"""A report of a run."""

from dataclasses import dataclass

from ds_embed.settings.fields import Settings, setting


@dataclass
class ReportArguments(Settings):
    """What to report, and from which vectors. Without vectors the page has the curves only."""

    run: str = setting("the --output_dir of a training run, finished or not; may also stand first, without the flag")
    output_dir: str | None = setting("folder for report.html and the charts (default: RUN/report)", default=None)
    compare: str | None = setting("another run, whose curves are laid over this one's", default=None)
    embeddings: str | None = setting(
        "folder OUT/consumed_samplesX with test_queries and test_docs (default: the newest in RUN/validation)",
        default=None,
    )
    query_files: list[str] = setting(
        "the queries' texts and, without --qrels, their right documents (default: the run's val_query_files)",
        default_factory=list,
        files=True,
    )
    doc_files: list[str] = setting(
        "the documents' texts (default: the run's val_doc_files)", default_factory=list, files=True
    )
    qrels: str | None = setting(
        "judgments: a TREC qrels file, a BEIR tsv, or JSON lines with query_id, doc_id and score", default=None
    )
    ignore_identical_ids: bool | None = setting(
        "leave out the document whose id is the query's own (default: as the run's validation did)", default=None
    )
    worst_queries: int = setting("number of failed queries shown with their texts", default=20, at_least=0)
    show_characters: int = setting("characters of each text shown", default=300, above=0)
    map: str = setting(
        "how documents become points: pca, or tsne (needs scikit-learn)", default="pca", choices=("pca", "tsne")
    )
    map_documents: int = setting("most documents on the map, drawn at random", default=2000, at_least=3)
    seed: int = setting("seed of what is drawn at random", default=42, at_least=0)
