"""The generate job: a model and files of texts in, vectors on disk out."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ds_embed.config import EncodeArguments, ModelArguments, TextArguments, resolve_deepspeed_config
from ds_embed.data.batch import pad
from ds_embed.data.store import TextStore, build_text_store, check_texts_fit
from ds_embed.data.tokenize import encode_texts
from ds_embed.distributed import World
from ds_embed.engine import partitioned_loading, start_inference_engine
from ds_embed.models.card import EmbeddingCard
from ds_embed.models.loading import ModelSource, choose_card, find_model, load_encoder, load_tokenizer
from ds_embed.retrieval.encode import encode_store

logger = logging.getLogger(__name__)


def generate(world: World, model: ModelArguments, text: TextArguments, arguments: EncodeArguments) -> Path:
    """Write consumed_samplesX/ under output_prefix and return its path. Every rank must call it."""
    source = find_model(model.model_name_or_path, arguments.adapter_path)
    card = choose_card(source, text, model)
    tokenizer = load_tokenizer(source, model.trust_remote_code)
    target = Path(arguments.output_prefix).expanduser().resolve() / f"consumed_samples{card.consumed_samples}"
    stores = _build_stores(world, arguments, tokenizer, card)
    encoder = _load(world, source, card, model, arguments)
    for name, folder, store in stores:
        encode_store(
            store,
            encoder,
            world,
            micro_batch_tokens=arguments.micro_batch_tokens,
            target=target / folder,
            name=name,
        )
    if arguments.doc_files:
        world.on_main("link test_doc", lambda: _link(target))
    if world.is_main:
        logger.info("vectors written to %s", target)
    return target


def encode_queries(
    queries: list[str], model: ModelArguments, text: TextArguments, *, adapter_path: str | None, bf16: bool
) -> np.ndarray:
    """Vectors (N, D) float32 of a few queries, in one forward pass, as generate would write them."""
    source = find_model(model.model_name_or_path, adapter_path)
    card = choose_card(source, text, model)
    tokenizer = load_tokenizer(source, model.trust_remote_code)
    encoder = load_encoder(
        source,
        pooling=card.pooling,
        bf16=bf16,
        attn_implementation=model.attn_implementation,
        trust_remote_code=model.trust_remote_code,
    )
    ids, lengths = pad(encode_texts(tokenizer, queries, card.text_formats()[0]))
    with torch.inference_mode():
        return encoder.eval()(torch.from_numpy(ids), torch.from_numpy(lengths)).numpy()


def _build_stores(
    world: World, arguments: EncodeArguments, tokenizer: Any, card: EmbeddingCard
) -> list[tuple[str, str, TextStore]]:
    """File name, folder name and token store of what there is to encode: queries, documents."""
    query_format, document_format = card.text_formats()
    jobs = [
        ("query", "test_queries", arguments.query_files, "query", "query_id", query_format),
        ("doc", "test_docs", arguments.doc_files, "pos_doc", "doc_id", document_format),
    ]
    stores = []
    for name, folder, files, text_key, id_key, text_format in jobs:
        if files:
            path = world.on_main(
                f"token store of {name}",
                lambda: str(build_text_store(files, text_key, id_key, tokenizer, text_format, arguments.cache_dir)),
            )
            store = TextStore.open(path)
            check_texts_fit(store, arguments.micro_batch_tokens)
            stores.append((name, folder, store))
    return stores


def _load(
    world: World, source: ModelSource, card: EmbeddingCard, model: ModelArguments, arguments: EncodeArguments
) -> Any:
    """The encoder, or the engine around it when a DeepSpeed JSON is given, ready for forward passes."""
    deepspeed_config = {"zero_optimization": {"stage": 0}}
    if arguments.deepspeed is not None:
        deepspeed_config = resolve_deepspeed_config(
            arguments.deepspeed, bf16=arguments.bf16, max_grad_norm=0.0, num_ranks=world.size
        )
    with partitioned_loading(deepspeed_config):
        encoder = load_encoder(
            source,
            pooling=card.pooling,
            bf16=arguments.bf16,
            attn_implementation=model.attn_implementation,
            trust_remote_code=model.trust_remote_code,
        )
    encoder.eval()
    encoder.requires_grad_(False)
    if deepspeed_config["zero_optimization"]["stage"] < 3:
        # Only ZeRO-3 changes a forward pass; the other stages would just cost a wrapper.
        return encoder.to(world.device)
    engine = start_inference_engine(encoder, deepspeed_config)
    engine.eval()
    return engine


def _link(target: Path) -> None:
    """A relative link test_doc beside test_docs: users of the older tool know both names."""
    link = target / "test_doc"
    if not link.is_symlink() and not link.exists():
        link.symlink_to("test_docs", target_is_directory=True)
