"""A report of a run."""

from dataclasses import dataclass

from ds_embed.settings.checks import above_zero, at_least, existing_files, one_of
from ds_embed.settings.fields import setting


@dataclass
class ReportArguments:
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
    )
    doc_files: list[str] = setting("the documents' texts (default: the run's val_doc_files)", default_factory=list)
    qrels: str | None = setting(
        "judgments: a TREC qrels file, a BEIR tsv, or JSON lines with query_id, doc_id and score", default=None
    )
    ignore_identical_ids: bool | None = setting(
        "leave out the document whose id is the query's own (default: as the run's validation did)", default=None
    )
    worst_queries: int = setting("number of failed queries shown with their texts", default=20)
    show_characters: int = setting("characters of each text shown", default=300)
    map: str = setting("how documents become points: pca, or tsne (needs scikit-learn)", default="pca")
    map_documents: int = setting("most documents on the map, drawn at random", default=2000)
    seed: int = setting("seed of what is drawn at random", default=42)

    def __post_init__(self):
        one_of(self, "map", ("pca", "tsne"))
        above_zero(self, "show_characters")
        at_least(self, 0, "worst_queries", "seed")
        at_least(self, 3, "map_documents")
        for name in ("query_files", "doc_files"):
            if getattr(self, name):
                existing_files(name, getattr(self, name))
