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
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.types import PromptType

from ds_embed.vectors.embedder import Embedder


class MTEBModel(AbsEncoder):
    """An Embedder behind mteb's encoder protocol.

    Documents of retrieval tasks are encoded as documents; queries, and the texts of tasks that have no
    two sides (similarity, classification, clustering), as queries. The model's own prefixes are put in
    front. use_task_prompts: instead, as mteb chooses them, the prompt that the model's files have under the
    task's name or type; else, for queries alone, mteb's instruction of the task in `instruction_template`.
    revision: of a hub name. Other keywords are those of Embedder.from_pretrained.
    """

    def __init__(
        self,
        model_name: str,
        revision: str | None = None,
        *,
        device: str | None = None,
        use_task_prompts: bool = False,
        instruction_template: str = "Instruct: {instruction}\nQuery: ",
        **settings: Any,
    ):
        self.embedder = Embedder.from_pretrained(model_name, device=device, revision=revision, **settings)
        card = self.embedder.card
        self.use_task_prompts = use_task_prompts
        self.instruction_template = instruction_template
        self.model_prompts = self.validate_task_to_prompt_name(card.prompts, raise_for_invalid_keys=False)[0]
        if use_task_prompts:
            settings |= {"instruction_template": instruction_template}
        folder = Path(model_name).expanduser()
        self.mteb_model_meta = ModelMeta.create_empty(
            {
                # mteb wants organisation/name; results are cached under it and the revision.
                "name": f"ds_embed/{folder.resolve().name}" if folder.exists() else model_name,
                "revision": _revision(self.embedder, folder, revision, settings),
                "embed_dim": self.embedder.dimensions,
                "max_tokens": max(card.query_max_length, card.doc_max_length),
                "similarity_fn_name": ScoringFunction.COSINE,
                "use_instructions": bool(use_task_prompts or card.query_prefix or card.doc_prefix),
                "framework": ["PyTorch"],
                "adapted_from": card.base_model,
            }
        )

    def encode(
        self, inputs: Any, *, task_metadata: TaskMetadata, prompt_type: PromptType | None = None, **unused: Any
    ) -> np.ndarray:
        """Vectors (n, D) of a data loader whose batches hold lists of n texts in all under "text"."""
        texts = [text for batch in inputs for text in batch["text"]]
        prefix = self._task_prefix(task_metadata, prompt_type) if self.use_task_prompts else None
        if prompt_type == PromptType.document:
            return self.embedder.encode_documents(texts, prefix=prefix)
        return self.embedder.encode_queries(texts, prefix=prefix)

    def _task_prefix(self, task: TaskMetadata, prompt_type: PromptType | None) -> str | None:
        """What a task has put in front of its texts; None where there is nothing of its own."""
        name = self.get_prompt_name(task, prompt_type)
        if name is not None:
            return self.model_prompts[name]
        return None if prompt_type == PromptType.document else self.get_task_instruction(task, prompt_type) or None


def _revision(embedder: Embedder, folder: Path, revision: str | None, settings: dict[str, Any]) -> str:
    """Changes when the model's files or the settings do, so that no result of another model is taken for this one's."""
    commit = None if folder.exists() else getattr(embedder.encoder.backbone.config, "_commit_hash", None)
    digest = hashlib.sha256(repr((sorted(settings.items()), commit)).encode())
    model = folder / "model" if (folder / "model").is_dir() else folder
    for path in sorted(model.glob("*")) if model.is_dir() else []:
        if path.is_file():
            state = path.stat()
            digest.update(f"{path.name} {state.st_size} {state.st_mtime_ns}\n".encode())
    return "-".join(filter(None, (revision, digest.hexdigest()[:16])))
