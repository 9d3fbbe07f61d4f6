"""The generate job: a model and files of texts in, vectors on disk out."""

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ds_embed.artifact.durable import check_writable_folder
from ds_embed.artifact.identity import identify_files, identify_tokenizer
from ds_embed.data.store import TextStore, build_text_store, check_texts_fit
from ds_embed.job.ranks import World
from ds_embed.models.card import EmbeddingCard
from ds_embed.models.cpu import describe_kernels, pack_linear_layers
from ds_embed.models.engine import partitioned_loading, start_inference_engine
from ds_embed.models.loading import check_stage, find_source, load_config
from ds_embed.models.varlen import describe_choice
from ds_embed.settings import EncodeArguments, ModelArguments, TextArguments, resolve_deepspeed_config
from ds_embed.settings.errors import UserError
from ds_embed.vectors.corpus import Corpus, check_one_dtype, merge_shards, shard_path
from ds_embed.vectors.corpus_plan import rows_of_shard
from ds_embed.vectors.encode import encode_store
from ds_embed.vectors.load import ModelToEncode, check_merging
from ds_embed.vectors.metrics import judged_documents
from ds_embed.vectors.vectors import Ids

# Of the model and its card: where it comes from (which the source identifies), and what only its training knew.
_NOT_OF_ROWS = {"model_name_or_path", "adapter_path", "model_revision", "step", "load_in_4bit", "trust_remote_code"}
_NOT_OF_ROWS |= {"normalize", "similarity", "prompts", "origins", "base_model", "consumed_samples", "temperature"}

logger = logging.getLogger(__name__)


def generate(
    world: World, model: ModelArguments, text: TextArguments, arguments: EncodeArguments, is_part: bool = False
) -> Path:
    """Write consumed_samplesX/ under output_prefix and return its path. Every rank must call it.

    is_part: of a larger job, whose user does not look there.

    What is finished stays as it is, what was begun is gone on with. UserError when what is there was made
    from other files, another model or other settings, or when another job is at it.
    """
    world.set_timeouts(arguments.rank_timeout_seconds, arguments.stall_timeout_seconds)
    deepspeed_config: dict[str, Any] = {"zero_optimization": {"stage": 0}}
    if arguments.deepspeed is not None:
        settings: dict[str, Any] = {"bf16": arguments.bf16, "max_grad_norm": 0.0, "num_ranks": world.size}
        deepspeed_config = resolve_deepspeed_config(arguments.deepspeed, **settings)
    stage = deepspeed_config["zero_optimization"].get("stage", 0)
    check_stage(model, stage)
    source = find_source(model)
    if arguments.merge_adapter:
        check_merging(source, model, stage)
    found = ModelToEncode.of(source, text, model)
    card, tokenizer = found.card, found.tokenizer
    if world.is_main:
        logger.info("\n".join(card.describe(tokenizer)))
    world.on_main("check model", found.check)
    prefix = Path(arguments.output_prefix).expanduser().resolve()
    world.on_main("check output_prefix", lambda: check_writable_folder("--output_prefix", prefix))
    embeddings = prefix / f"consumed_samples{card.consumed_samples}"
    if stage == 3 and source.checkpoint is not None:
        raise UserError(
            f"--deepspeed {arguments.deepspeed}: under ZeRO-3 no rank holds the whole model that a checkpoint is read into; "
            "leave it out, or export the checkpoint first, by ds-embed export"
        )
    commit = getattr(load_config(source, model.trust_remote_code), "_commit_hash", None)
    made_from = dict(world.on_main("identify the model", lambda: source.identify(commit)))
    dtype = torch.bfloat16 if arguments.bf16 else torch.float32
    found, against = found.with_kernel(world, arguments.bf16)
    made_from["kernels"] = describe_kernels(world.device.type, dtype, stage == 3)
    if against is None:
        made_from["kernels"] += ", varlen"
    if world.is_main and (against is None or world.device.type == "cuda"):
        logger.info("attention      %s", describe_choice(model.attn_implementation, against))
    stores = build_stores(world, arguments, tokenizer, card)
    if len(stores) == 2:
        world.on_main("check judgments", lambda: _check_judgments(arguments, stores[1][2]))
    index, num_shards = arguments.shard_index, arguments.num_shards
    jobs: list[tuple[Corpus, TextStore, range]] = []
    for kind, folder, store in stores:
        rows = range(store.num_texts) if index is None else rows_of_shard(store.num_texts, index, num_shards)
        path = embeddings / folder if index is None else shard_path(embeddings / folder, index, num_shards)
        origin = made_from | _made_from(kind, store, card, model, arguments)
        jobs.append((Corpus(path, kind, origin, arguments.vector_dtype), store, rows))

    def find_unfinished() -> list[int]:
        for corpus, _, _ in jobs:
            corpus.claim()
        for folder in {"test_queries", "test_docs"}.difference(folder for _, folder, _ in stores):
            check_one_dtype(Corpus(embeddings / folder, "", dtype=arguments.vector_dtype))
        return [i for i, (corpus, _, _) in enumerate(jobs) if not corpus.is_finished(arguments.accept_changes)]

    unfinished = [jobs[i] for i in world.on_main("find what is unfinished", find_unfinished)]
    if arguments.merge_shards:
        for corpus, store, _ in unfinished:
            world.on_main("merge", lambda: merge_shards(corpus, store, num_shards, arguments.accept_changes))
    elif unfinished:
        world.mark("load model")
        encoder = _load(world, found, arguments, deepspeed_config)
        for corpus, store, rows in unfinished:
            world.mark(f"encode {corpus.name}")
            budget, save_seconds = arguments.micro_batch_tokens, arguments.save_seconds
            options = {"micro_batch_tokens": budget, "rows": rows, "goes_on": True, "save_seconds": save_seconds}
            encode_store(store, encoder, world, corpus, is_packed=against is None, **options)
    if arguments.doc_files and index is None:
        world.on_main("link test_doc", lambda: link_test_doc(embeddings))
    if world.is_main:
        for job in jobs:
            corpus, _, rows = job
            state = "written to" if job in unfinished else "finished already, they are in"
            corpus.release()
            if is_part:
                continue
            numbers = "" if corpus.dtype == "float32" else f", as {corpus.dtype}"
            logger.info("%s vectors %s %s%s", f"{len(rows):,} {corpus.name}", state, corpus.path, numbers)
    return embeddings


def build_stores(
    world: World, arguments: EncodeArguments, tokenizer: Any, card: EmbeddingCard, prefix: str = ""
) -> list[tuple[str, str, TextStore]]:
    """File name, folder name and token store of what there is to encode: queries, documents.

    `prefix` is that of the flags that name the files. UserError: texts that are too long, one id on two documents.
    """
    kinds = [
        ("query", "test_queries", arguments.query_files, ("query", "query_id", "prompt")),
        ("doc", "test_docs", arguments.doc_files, ("pos_doc", "doc_id", "title")),
    ]
    stores = []
    for (kind, folder, files, keys), form in zip(kinds, card.text_formats()):
        if files:
            columns = [word for word in arguments.columns if word.partition("=")[0] in keys]

            def build() -> str:
                text, name = keys[:2]
                path = build_text_store(files, text, name, tokenizer, form, arguments.cache_dir, columns=columns)
                return str(_checked(path, arguments, f"--{prefix}{kind}_files"))

            path = world.on_main(f"token store of {kind}", build)
            stores.append((kind, folder, TextStore.open(path)))
    return stores


def _checked(path: Path, arguments: EncodeArguments, flag: str) -> Path:
    """The store, when its texts can be encoded and each has an id of its own, which all readers of vectors want."""
    store = TextStore.open(path)
    logger.info("\n".join(store.describe()))
    check_texts_fit(store, arguments.micro_batch_tokens)
    ids = Ids(store.ids_path.read_bytes())
    order, same = ids.sorted_rows
    if same.any():
        place = int(np.argmax(same))
        first, row = order[[place - 1, place]].tolist()
        raise UserError(
            f"{flag}: {store.location(row)}: the doc_id '{ids[row]}' stands more than once, at {store.location(first)} "
            f"already ({int(same.sum()):,} such lines); give each document its own"
        )
    return path


def _check_judgments(arguments: EncodeArguments, documents: TextStore) -> None:
    """Warn of right documents of the queries that are not among the documents."""
    named = judged_documents(arguments.query_files)
    missing = set(named).difference(Ids(documents.ids_path.read_bytes()))
    if missing:
        example = min(missing, key=list(named).index)
        logger.warning(
            "warning: %s of the %s documents that --query_files name as right are not among --doc_files, such as '%s' "
            "of %s: with these vectors nothing can be measured without --skip_unknown true",
            f"{len(missing):,}",
            f"{len(named):,}",
            example,
            named[example],
        )


def _made_from(
    kind: str, store: TextStore, card: EmbeddingCard, model: ModelArguments, arguments: EncodeArguments
) -> dict[str, str]:
    """What decides the rows of one kind beside the weights, by the name of its flag where it has one."""
    other = {"query": "doc_", "doc": "query_"}[kind]
    settings = asdict(card) | asdict(model)
    settings = {n: value for n, value in settings.items() if n not in _NOT_OF_ROWS and not n.startswith(other)}
    settings |= {
        "pooling": card.pooling,
        "bidirectional": card.bidirectional,
        "bf16": arguments.bf16,
        "micro_batch_tokens": arguments.micro_batch_tokens,
        "merge_adapter": arguments.merge_adapter,
    }
    known = {f"{kind}_files": identify_files(store.manifest), "tokenizer": identify_tokenizer(store.manifest)}
    return known | {name: repr(value) for name, value in settings.items()}


def _load(world: World, found: ModelToEncode, arguments: EncodeArguments, deepspeed_config: dict[str, Any]) -> Any:
    """The encoder, or the engine around it under ZeRO-3, ready for forward passes."""
    if arguments.merge_adapter:
        encoder, cosine = found.load_merged(bf16=arguments.bf16, device=world.device)
        if world.is_main:
            dtype = "bfloat16" if arguments.bf16 else "float32"
            told = "adapter merged into the base in float32, computed in %s: the smallest cosine of a few texts to base and "
            logger.info(told + "adapter side by side in float32 is %.6f", dtype, cosine)
    else:
        with partitioned_loading(deepspeed_config):
            encoder = found.load(bf16=arguments.bf16)
    if deepspeed_config["zero_optimization"].get("stage", 0) < 3:
        # Only ZeRO-3 changes a forward pass; the other stages would just cost a wrapper.
        encoder.to(world.device)
        pack_linear_layers(encoder)
        return encoder
    engine = start_inference_engine(encoder, deepspeed_config)
    engine.eval()
    return engine


def link_test_doc(target: Path) -> None:
    """A relative link test_doc beside test_docs: users of the older tool know both names."""
    link = target / "test_doc"
    if not link.is_symlink() and not link.exists():
        link.symlink_to("test_docs", target_is_directory=True)
