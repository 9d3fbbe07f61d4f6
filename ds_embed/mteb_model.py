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
    two sides (similarity, classification, clustering), as queries. What stands in front of a text is, the first that
    there is: the prompt that `prompts` or the model's files have under the task's name or type, as mteb
    names them (SciFact-query, Retrieval-document, STS, ...); for queries, mteb's instruction of the task in
    `instruction_template`, such as "Instruct: {instruction}\nQuery: "; the model's own prefix.
    model: a name or folder, of which the other keywords are those of Embedder.from_pretrained, or an Embedder.
    """

    def __init__(
        self,
        model: str | Path | Embedder,
        revision: str | None = None,
        *,
        device: str | None = None,
        prompts: dict[str, str] | None = None,
        instruction_template: str | None = None,
        **settings: Any,
    ):
        if isinstance(model, (str, Path)):
            model = Embedder.from_pretrained(str(model), device=device, revision=revision, **settings)
        self.embedder, card = model, model.card
        self.instruction_template = instruction_template
        own = self.validate_task_to_prompt_name(card.prompts, raise_for_invalid_keys=False)[0]
        self.model_prompts = (own or {}) | (prompts or {})
        base = model.name
        folder = Path(base).expanduser()
        self.mteb_model_meta = ModelMeta.create_empty(
            {
                # mteb wants organisation/name; results are cached under it and the revision.
                "name": f"ds_embed/{folder.resolve().name}" if folder.exists() else base,
                "revision": "-".join(filter(None, (revision, self._digest()))),
                "embed_dim": model.dimensions,
                "max_tokens": max(card.query_max_length, card.doc_max_length),
                "similarity_fn_name": ScoringFunction.COSINE,
                "use_instructions": bool(
                    self.model_prompts or instruction_template or card.query_prefix or card.doc_prefix
                ),
                "framework": ["PyTorch"],
                "adapted_from": card.base_model,
            }
        )

    def encode(
        self, inputs: Any, *, task_metadata: TaskMetadata, prompt_type: PromptType | None = None, **unused: Any
    ) -> np.ndarray:
        """Vectors (n, D) of a data loader whose batches hold lists of n texts in all under "text"."""
        texts = [text for batch in inputs for text in batch["text"]]
        prefix = self._prefix(task_metadata, prompt_type)
        if prompt_type == PromptType.document:
            return self.embedder.encode_documents(texts, prefix=prefix)
        return self.embedder.encode_queries(texts, prefix=prefix)

    def _prefix(self, task: TaskMetadata, prompt_type: PromptType | None) -> str | None:
        """What a task has put in front of its texts; None where there is nothing of its own."""
        name = self.get_prompt_name(task, prompt_type)
        if name is not None:
            return self.model_prompts[name]
        if prompt_type == PromptType.document or self.instruction_template is None:
            return None
        return self.get_task_instruction(task, prompt_type) or None

    def _digest(self) -> str:
        """Changes when weights or settings do, so that no result of another model is taken for this one's."""
        encoder, source = self.embedder.encoder, self.embedder.source
        commit = getattr(encoder.backbone.config, "_commit_hash", None)
        known = {} if source is None else source.identify(commit)
        dtype = next(encoder.parameters()).dtype
        said = (
            self.embedder.card.content,
            self.embedder.dimensions,
            self.embedder.merging_cosine,
            self.model_prompts,
            self.instruction_template,
            dtype,
        )
        return hashlib.sha256(repr((sorted(known.items()), said)).encode()).hexdigest()[:16]
