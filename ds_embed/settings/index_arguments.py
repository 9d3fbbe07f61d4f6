"""Approximate search: which FAISS index, and its parameters."""

from dataclasses import dataclass

from ds_embed.settings.errors import UserError
from ds_embed.settings.fields import Settings, setting

INDEX_KINDS = ("flat", "hnsw", "ivf")


@dataclass
class IndexArguments(Settings):
    """Parameters of FAISS indexes; the search parameters may change from one search to the next."""

    hnsw_links: int = setting(
        "HNSW's M: links per document and layer; more links raise recall and memory use", default=32, at_least=2
    )
    hnsw_ef_construction: int = setting("HNSW: candidates considered when a document is added", default=200, above=0)
    hnsw_ef_search: int = setting("HNSW: candidates considered per query, at least top_k", default=128, above=0)
    ivf_lists: int = setting(
        "IVF's nlist: number of cells; 0 chooses 4 sqrt(documents), but at least 39 documents per cell",
        default=0,
        at_least=0,
    )
    ivf_probes: int = setting("IVF's nprobe: cells searched per query", default=16, above=0)


@dataclass
class SearchIndexArguments(IndexArguments):
    """What is searched: all documents exactly, a new index, or an index read from a file."""

    index: str = setting(
        f"exact, or a FAISS index built for this search: {', '.join(INDEX_KINDS)} (flat is exact in float32)",
        default="exact",
        choices=("exact", *INDEX_KINDS),
    )
    index_file: str | None = setting(
        "file with a FAISS index of these documents, written by recipes/build_index.py; replaces index", default=None
    )

    def __post_init__(self):
        super().__post_init__()
        if self.index_file is not None and self.index != "exact":
            raise UserError(
                f"--index_file and --index {self.index}: give only one; the file determines the kind of index"
            )
