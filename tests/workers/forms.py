"""Losses of two training steps on every one of several training files, on however many ranks the launcher starts.

deepspeed --num_gpus W tests/workers/forms.py CASES.json OUT.json
"""

import json
import sys
from pathlib import Path

from ds_embed.data.batch import assemble_batch
from ds_embed.job.ranks import initialize, run_recipe
from ds_embed.models.card import EmbeddingCard
from ds_embed.models.engine import partitioned_loading, start_engine
from ds_embed.models.loading import find_model, load_encoder, load_tokenizer
from ds_embed.settings import DataArguments, OptimizerArguments, StepArguments, resolve_deepspeed_config
from ds_embed.training.prepare import file_formats, prepare_store, sample_order
from ds_embed.training.step import ContrastiveStep

NUM_QUERIES = 4


def losses_of(world, model: str, name: str, files: list[str], settings: dict, cache: str) -> list[float]:
    data = DataArguments(train_files=files, hard_negatives=2, cache_dir=cache, **settings)
    arguments = StepArguments(global_batch_size=NUM_QUERIES, micro_batch_tokens=64, temperature=0.1)
    card = EmbeddingCard(
        base_model=model,
        consumed_samples=0,
        pooling="mean",
        bidirectional=False,
        query_prefix="query: ",
        doc_prefix="passage: ",
        query_max_length=32,
        doc_max_length=32,
        append_eos=False,
    )
    tokenizer = load_tokenizer(find_model(model), False)
    store = prepare_store(world, files, data, arguments, tokenizer, file_formats(data, card), f"store of {name}")
    order = sample_order(store, data, arguments, seed=3)
    config = resolve_deepspeed_config("ds_configs/zero2.json", bf16=False, max_grad_norm=1.0)
    with partitioned_loading(config):
        encoder = load_encoder(
            find_model(model),
            pooling="mean",
            bidirectional=False,
            bf16=False,
            attn_implementation=None,
            trust_remote_code=False,
        )
    engine = start_engine(encoder, config, OptimizerArguments(learning_rate=1e-2), world)
    engine.train()
    step, losses = ContrastiveStep(engine, store, world, arguments, seed=3), []
    for number in range(2):
        batch = assemble_batch(
            store, order, first_sample=number * NUM_QUERIES, num_queries=NUM_QUERIES, hard_negatives=2
        )
        losses.append(step.run(step.prepare(batch)).loss)
        engine.step()
    engine.destroy()
    return losses


def main() -> None:
    world = initialize()
    work = json.loads(Path(sys.argv[1]).read_text())
    losses = {
        name: losses_of(world, work["model"], name, files, settings, work["cache"])
        for name, (files, settings) in work["cases"].items()
    }
    if world.is_main:
        Path(sys.argv[2]).write_text(json.dumps(losses))


if __name__ == "__main__":
    sys.argv = [a for a in sys.argv if not a.startswith("--local_rank")]
    raise SystemExit(run_recipe(main))
