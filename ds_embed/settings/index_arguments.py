"""Approximate search: which FAISS index, and its parameters."""

from dataclasses import dataclass

from ds_embed.settings.errors import UserError
from ds_embed.settings.fields import Settings, setting

INDEX_KINDS = ("flat", "hnsw", "ivf")


@dataclass
class IndexArguments(Settings):
    """Parameters of FAISS indexes; those of the search may change from one search to the next."""

    hnsw_links: int = setting(
        "HNSW's M: links of a document on each layer; more find more and take memory", default=32, at_least=2
    )
    hnsw_ef_construction: int = setting("HNSW: documents looked at when one is added", default=200, above=0)
    hnsw_ef_search: int = setting("HNSW: documents looked at for a query, at least top_k", default=128, above=0)
    ivf_lists: int = setting(
        "IVF's nlist: cells that the documents are dealt to; 0 takes 4 sqrt(documents), with 39 documents a cell or more",
        default=0,
        at_least=0,
    )
    ivf_probes: int = setting("IVF's nprobe: cells that are searched for a query", default=16, above=0)


@dataclass
class SearchIndexArguments(IndexArguments):
    """What a search goes through: all documents, an index made for it, or one that was kept in a file."""

    index: str = setting(
        f"exact, or a FAISS index built for this search: {', '.join(INDEX_KINDS)} (flat is exact in float32)",
        default="exact",
        choices=("exact", *INDEX_KINDS),
    )
    index_file: str | None = setting(
        "FAISS index of these documents that recipes/build_index.py wrote, in place of index", default=None
    )

    def __post_init__(self):
        super().__post_init__()
        if self.index_file is not None and self.index != "exact":
            raise UserError(f"--index_file and --index {self.index}: give one of them; a file knows its kind")
