"""The files that make a Hugging Face folder one of sentence-transformers."""

import json
from pathlib import Path
from typing import Any

from ds_embed.models.card import EmbeddingCard

_POOLING_FLAGS = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "weighted_mean": "pooling_mode_weightedmean_tokens",
    "last": "pooling_mode_lasttoken",
}


def write_modules(folder: Path, card: EmbeddingCard, dimensions: int, model_options: dict[str, Any]) -> None:
    """Transformer, pooling, normalisation, and the prefixes as prompts "query" and "document".

    In the spelling that all versions of sentence-transformers read. Where queries and documents differ
    in length, each gets its own, which version 6 introduced.
    """
    from sentence_transformers import __version__

    names = ["Transformer", "Pooling", "Normalize"]
    paths = ["", "1_Pooling", "2_Normalize"]
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{name}"}
        for number, (name, path) in enumerate(zip(names, paths))
    ]
    _write(folder / "modules.json", modules)
    transformer: dict[str, Any] = {
        "max_seq_length": max(card.query_max_length, card.doc_max_length),
        "do_lower_case": False,  # the tokenizer does where it should
    }
    if card.query_max_length != card.doc_max_length:
        transformer |= {"query_length": card.query_max_length, "document_length": card.doc_max_length}
    if model_options:
        transformer["model_args"] = model_options
    _write(folder / "sentence_bert_config.json", transformer)
    pooling: dict[str, Any] = {"word_embedding_dimension": dimensions}
    pooling |= {flag: name == card.pooling for name, flag in _POOLING_FLAGS.items()}
    for path in paths[1:]:
        (folder / path).mkdir()
    _write(folder / paths[1] / "config.json", pooling | {"include_prompt": True})
    settings = {
        "__version__": {"sentence_transformers": __version__},
        "prompts": {"query": card.query_prefix, "document": card.doc_prefix},
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    }
    _write(folder / "config_sentence_transformers.json", settings)


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
