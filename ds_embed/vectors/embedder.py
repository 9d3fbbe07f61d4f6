"""Texts to vectors from Python: what recipes/generate.py writes, in one process, with neither files nor DeepSpeed.

    from ds_embed import Embedder

    embedder = Embedder.from_pretrained("RUN")
    scores = embedder.encode_queries(["what is ..."]) @ embedder.encode_documents(["The answer ..."]).T

Shapes: n texts, D dimensions.
"""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ds_embed.data.tokenize import TextFormat, TextTokenizer
from ds_embed.job.ranks import World
from ds_embed.models.card import EmbeddingCard
from ds_embed.models.cpu import pack_linear_layers
from ds_embed.models.encoder import TextEncoder
from ds_embed.models.loading import ModelSource, find_source
from ds_embed.settings import ModelArguments, TextArguments
from ds_embed.settings.errors import UserError
from ds_embed.vectors.corpus_plan import BLOCK_TEXTS, cut_block
from ds_embed.vectors.encode import encode_tokens
from ds_embed.vectors.load import ModelToEncode, check_merging

_DTYPES = ("bfloat16", "float32")


class Embedder:
    """A model that is ready to encode; make one with `Embedder.from_pretrained`.

    Micro-batches are those of generate, so on the same device, with the same threads and settings, the
    vectors are the same bits; in other micro-batches float32 vectors differ by some 1e-7.
    `dimensions` is D, `card` says how texts become vectors. `merging_cosine` is, with merge_adapter, the smallest
    cosine of a few texts' vectors to those of base and adapter side by side in float32; else None.
    """

    merging_cosine: float | None = None

    def __init__(
        self,
        encoder: TextEncoder,
        tokenizer: Any,
        card: EmbeddingCard,
        *,
        micro_batch_tokens: int = 16384,
        truncate_dim: int | None = None,
        keep_weights: bool = False,
        world: World | None = None,
    ):
        """keep_weights: on a CPU too, where linear layers are packed otherwise: faster, and not to be read or saved.

        world: ranks that share the forward passes. All of them must encode the same texts, and all get the vectors.
        """
        self.encoder = encoder.eval().requires_grad_(False)
        if not keep_weights:
            pack_linear_layers(self.encoder)
        self.tokenizer = tokenizer
        self.card = card
        self.micro_batch_tokens = micro_batch_tokens
        self.dimensions = encode_tokens(self.encoder, [np.zeros(1, np.int32)], 0).shape[1]
        if truncate_dim is not None:
            if not 1 <= truncate_dim <= self.dimensions:
                raise UserError(f"truncate_dim {truncate_dim}: the model has vectors of {self.dimensions} dimensions")
            self.dimensions = truncate_dim
        self._truncated = truncate_dim is not None
        self._world = world or World.alone()
        # What from_source was asked for, and what that is.
        self.name = card.base_model
        self.source: ModelSource | None = None

    @classmethod
    def from_pretrained(
        cls,
        model_name_or_path: str,
        *,
        adapter_path: str | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "bfloat16",
        revision: str | None = None,
        merge_adapter: bool = False,
        micro_batch_tokens: int = 16384,
        truncate_dim: int | None = None,
        keep_weights: bool = False,
        **settings: Any,
    ) -> "Embedder":
        """Load a run, an exported or base model's folder, or a hub name, with an adapter on it if asked.

        device: default cuda where there is one, else cpu. dtype: bfloat16 (generate's default) or float32.
        truncate_dim: keep the first so many dimensions, normalised again. keep_weights: see Embedder.
        merge_adapter: see generate's flag. revision: of a hub name. settings: others of generate by their flags: step of
        a run, whose checkpoint is taken, attn_implementation, trust_remote_code, load_in_4bit; for models that say
        nothing of themselves pooling, normalize, bidirectional, max_length, query_max_length, doc_max_length,
        query_prefix, doc_prefix. `card.describe(tokenizer)` says what was taken. UserError names the setting.
        """
        name = str(dtype).removeprefix("torch.")
        if name not in _DTYPES:
            raise UserError(f"dtype {dtype}: choose one of {', '.join(_DTYPES)}")
        of_model = {one.name: settings.pop(one.name) for one in fields(ModelArguments) if one.name in settings}
        adapter = None if adapter_path is None else str(adapter_path)
        model = ModelArguments(str(model_name_or_path), adapter, model_revision=revision, **of_model)
        return cls.from_source(
            find_source(model),
            model,
            TextArguments(**settings),
            device=device,
            bf16=name == "bfloat16",
            merge_adapter=merge_adapter,
            micro_batch_tokens=micro_batch_tokens,
            truncate_dim=truncate_dim,
            keep_weights=keep_weights,
        )

    @classmethod
    def from_source(
        cls,
        source: ModelSource,
        model: ModelArguments,
        text: TextArguments,
        *,
        device: str | torch.device | None,
        bf16: bool,
        merge_adapter: bool = False,
        **options: Any,
    ) -> "Embedder":
        """What `from_pretrained` does for a model that find_model has found."""
        found = ModelToEncode.of(source, text, model)
        found.check()
        device, cosine = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")), None
        found, _ = found.with_kernel(replace(options.get("world") or World.alone(), device=device), bf16)
        if merge_adapter:
            check_merging(source, model)
            encoder, cosine = found.load_merged(bf16=bf16, device=device)
        else:
            encoder = found.load(bf16=bf16)
        embedder = cls(encoder.to(device), found.tokenizer, found.card, **options)
        embedder.merging_cosine = cosine
        embedder.name, embedder.source = model.model_name_or_path, source
        return embedder

    def encode_queries(self, texts: Sequence[str], *, prefix: str | None = None, progress: bool = False) -> np.ndarray:
        """Vectors, float32 (n, D), of queries in their order. prefix: for these alone; `progress` shows a bar."""
        return self._encode(texts, self.card.text_formats()[0], prefix, "queries", progress)

    def encode_documents(
        self, texts: Sequence[str], *, prefix: str | None = None, progress: bool = False
    ) -> np.ndarray:
        """Vectors, float32 (n, D), of documents in their order. prefix: for these alone; `progress` shows a bar."""
        return self._encode(texts, self.card.text_formats()[1], prefix, "documents", progress)

    def _encode(
        self, texts: Sequence[str], text_format: TextFormat, prefix: str | None, name: str, progress: bool
    ) -> np.ndarray:
        if isinstance(texts, str):
            raise UserError(f"one string was given; give a list of {name}")
        for index, text in enumerate(texts):
            if not isinstance(text, str):  # such as None and pandas' NaN
                raise UserError(f"text {index} of the {name} is {text!r}, expected a string")
        if prefix is not None:
            text_format = replace(text_format, prefix=prefix)
        tokenizer = TextTokenizer(self.tokenizer, text_format)
        tokens = tokenizer.encode(texts)
        lengths = np.array([len(row) for row in tokens], dtype=np.int64)
        if len(tokens) and not lengths.min():
            raise UserError(f"text {int(lengths.argmin())} of the {name} has no tokens: leave blank texts out")
        rows = np.empty((len(tokens), self.dimensions), dtype=np.float32)
        with tqdm(total=len(tokens), unit="text", desc=f"encoding {name}", disable=not progress) as bar:
            for start in range(0, len(tokens), BLOCK_TEXTS):
                keys = (row.tobytes() for row in tokens[start : start + BLOCK_TEXTS])
                of_block, tokens_each = lengths[start : start + BLOCK_TEXTS], self.micro_batch_tokens
                batches = cut_block(keys, of_block, tokens_each, self.encoder.is_packed)

                def vectors_of(number: int | None) -> torch.Tensor:
                    if number is None:
                        return torch.empty(0, self.dimensions, device=next(self.encoder.parameters()).device)
                    of_batch = [tokens[start + text] for text in batches[number].texts]
                    vectors = encode_tokens(self.encoder, of_batch, tokenizer.prompt_length)[:, : self.dimensions]
                    bar.update(len(batches[number].rows))
                    unit = self._truncated and self.card.makes_unit_vectors
                    return torch.nn.functional.normalize(vectors, dim=1) if unit else vectors

                shared = self._world.rows_in_turn([len(batch.texts) for batch in batches], vectors_of)
                for batch, vectors in zip(batches, shared):
                    rows[start + batch.rows] = vectors[batch.uses]
        return rows
