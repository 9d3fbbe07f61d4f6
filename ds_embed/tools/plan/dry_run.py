"""Jobs to size: a training run as it would start, and one that is only thought of."""

import logging
import os
from dataclasses import replace

import numpy as np

from ds_embed.data.batch import GlobalBatch, assemble_batch
from ds_embed.data.plan import check_budget
from ds_embed.job.ranks import World
from ds_embed.models.loading import choose_card, find_model, load_config, load_tokenizer
from ds_embed.models.lora import resolve_lora
from ds_embed.settings import (
    DataArguments,
    DryRunArguments,
    HardwareArguments,
    LoraArguments,
    ModelArguments,
    OptimizerArguments,
    RunArguments,
    SizingArguments,
    StepArguments,
    resolve_deepspeed_config,
)
from ds_embed.tools.plan.job import DEFAULT_GPU_GIB, Job, table
from ds_embed.tools.plan.memory import GIB
from ds_embed.training.loop import TrainingRun
from ds_embed.training.prepare import file_formats, prepare_store, sample_order
from ds_embed.training.schedule import count_steps

logger = logging.getLogger(__name__)


def print_dry_run(run: TrainingRun, arguments: DryRunArguments) -> None:
    """Say what a training run will take on the ranks that the launcher started; rank 0 prints. Every rank calls it."""
    run.prepare()
    if not run.world.is_main:
        return
    batch = run.batch(0)
    job = Job(
        run.model,
        run.lora,
        run.step_arguments,
        run.run,
        run.deepspeed_config,
        config=run.config,
        card=run.card,
        longest_text=int(np.max(run.store.lengths)),
        lengths=batch.lengths,
        lengths_from=f"the first batch, {_named(batch)}",
        max_steps=run.max_steps,
        num_ranks=run.world.size,
        ranks_per_node=run.world.local_size,
        on_gpu=run.world.device.type == "cuda",
        hardware=_with_memory(arguments, run.world.device.type == "cuda", run.world.local_size),
    )
    logger.info("%s\n\ndry run: nothing was loaded, nothing written to %s", table(job), run.run.output_dir)


def job_to_size(
    world: World,
    model: ModelArguments,
    lora: LoraArguments,
    data: DataArguments,
    step: StepArguments,
    optimizer: OptimizerArguments,
    run: RunArguments,
    sizing: SizingArguments,
) -> Job:
    """A job on GPUs that need not be here. Only the model's config is read, and train_files where there are any."""
    deepspeed_config = resolve_deepspeed_config(
        run.deepspeed, bf16=run.bf16, max_grad_norm=optimizer.max_grad_norm, num_ranks=sizing.num_gpus
    )
    source = find_model(model.model_name_or_path, model.adapter_path)
    config = load_config(source, model.trust_remote_code)
    lora = resolve_lora(lora, source, config, model.trust_remote_code)
    card = choose_card(source, data, model)
    longest = max(card.query_max_length, card.doc_max_length)
    num_records = sizing.num_records
    if data.train_files:
        tokenizer = load_tokenizer(source, model.trust_remote_code)
        store = prepare_store(world, data.train_files, data, step, tokenizer, file_formats(data, card))
        order = sample_order(store, data, step, run.seed)
        batch = assemble_batch(
            store,
            order,
            first_sample=0,
            num_queries=step.global_batch_size,
            hard_negatives=data.hard_negatives,
            hard_negatives_sampling=data.hard_negatives_sampling,
        )
        lengths, num_records = batch.lengths, store.num_records
        lengths_from = f"the first batch of train_files, {_named(batch)}"
        longest = int(np.max(store.lengths))
    else:
        query, document = (
            min(sizing.mean_query_tokens, card.query_max_length),
            min(sizing.mean_doc_tokens, card.doc_max_length),
        )
        queries = step.global_batch_size
        lengths = np.repeat([query, document], [queries, queries * (1 + data.hard_negatives)])
        lengths_from = f"assumed: {query} tokens a query, {document} a document"
    check_budget(longest, step.micro_batch_tokens)
    max_steps = optimizer.max_steps
    if num_records is not None:
        max_steps = count_steps(num_records, step.global_batch_size, optimizer)
    return Job(
        model,
        lora,
        step,
        run,
        deepspeed_config,
        config=config,
        card=card,
        longest_text=longest,
        lengths=lengths,
        lengths_from=lengths_from,
        max_steps=max_steps,
        num_ranks=sizing.num_gpus,
        ranks_per_node=min(sizing.num_gpus, sizing.gpus_per_node),
        on_gpu=True,
        hardware=_with_memory(sizing, True, sizing.gpus_per_node),
    )


def _named(batch: GlobalBatch) -> str:
    return f"each text once of {len(batch.rows):,} with {batch.num_tokens_named:,} tokens"


def _with_memory(hardware: HardwareArguments, on_gpu: bool, ranks_per_node: int) -> HardwareArguments:
    """Where no memory is given, that of the GPU here, or of a CPU rank its share of the machine's."""
    import torch

    if hardware.gpu_memory_gb is not None:
        return hardware
    if not on_gpu:
        here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks_per_node / GIB
    elif torch.cuda.is_available():
        here = torch.cuda.get_device_properties(0).total_memory / GIB
    else:
        here = DEFAULT_GPU_GIB
    return replace(hardware, gpu_memory_gb=here)
