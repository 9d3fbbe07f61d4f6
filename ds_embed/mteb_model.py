"""A run as a model of MTEB, so that its benchmarks measure exactly the vectors that generate writes.

    import mteb
    from ds_embed.mteb_model import MTEBModel

    mteb.evaluate(MTEBModel("RUN"), mteb.get_tasks(["NFCorpus"]))

Needs mteb: pip install -e '.[mteb]'.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.types import PromptType

from ds_embed.vectors.embedder import Embedder


class MTEBModel(AbsEncoder):
    """An Embedder behind mteb's encoder protocol.

    Documents of retrieval tasks are encoded as documents; queries, and the texts of tasks that have no
    two sides (similarity, classification, clustering), as queries. The run's own prefixes are put in
    front; mteb's prompts are not used. Keywords are those of Embedder.from_pretrained.
    """

    def __init__(self, model_name: str, revision: str | None = None, *, device: str | None = None, **settings: Any):
        self.embedder = Embedder.from_pretrained(model_name, device=device, **settings)
        card = self.embedder.card
        folder = Path(model_name).expanduser()
        self.mteb_model_meta = ModelMeta.create_empty(
            {
                # mteb wants organisation/name; results are cached under it and the revision.
                "name": f"ds_embed/{folder.resolve().name}" if folder.exists() else model_name,
                "revision": revision or _fingerprint(folder, settings),
                "embed_dim": self.embedder.dimensions,
                "max_tokens": max(card.query_max_length, card.doc_max_length),
                "similarity_fn_name": ScoringFunction.COSINE,
                "use_instructions": bool(card.query_prefix or card.doc_prefix),
                "framework": ["PyTorch"],
                "adapted_from": card.base_model,
            }
        )

    def encode(self, inputs: Any, *, prompt_type: PromptType | None = None, **unused: Any) -> np.ndarray:
        """Vectors (n, D) of a data loader whose batches hold lists of n texts in all under "text"."""
        texts = [text for batch in inputs for text in batch["text"]]
        if prompt_type == PromptType.document:
            return self.embedder.encode_documents(texts)
        return self.embedder.encode_queries(texts)


def _fingerprint(folder: Path, settings: dict[str, Any]) -> str:
    """Changes when the model's files or the settings do, so that no result of another model is taken for this one's."""
    digest = hashlib.sha256(repr(sorted(settings.items())).encode())
    model = folder / "model" if (folder / "model").is_dir() else folder
    for path in sorted(model.glob("*")) if model.is_dir() else []:
        if path.is_file():
            state = path.stat()
            digest.update(f"{path.name} {state.st_size} {state.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]
