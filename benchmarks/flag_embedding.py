"""FlagEmbedding's fine-tuning of encoders, run as in its documentation: a contestant with its own process.

Its extra for fine-tuning requires flash-attn, which needs a GPU, but the trainer runs without it: `pip install
--no-deps FlagEmbedding` (and ir-datasets, sentencepiece, which it imports).
"""

import json
from pathlib import Path

from peers import Steps

from ds_embed.data.files import read_records
from ds_embed.settings.errors import UserError


def train(
    *,
    model: str,
    train_file: str,
    folder: str,
    batch_size: int,
    max_length: int,
    max_steps: int,
    skip_steps: int,
    learning_rate: float,
    temperature: float,
    pooling: str,
    lora_rank: int,
    bf16: bool,
) -> dict:
    """Its EncoderOnlyEmbedderRunner without hard negatives, in fp32, or bf16 by autocast; counts tokens like ours."""
    from FlagEmbedding.finetune.embedder.encoder_only.base import (
        EncoderOnlyEmbedderDataArguments,
        EncoderOnlyEmbedderModelArguments,
        EncoderOnlyEmbedderRunner,
        EncoderOnlyEmbedderTrainingArguments,
    )
    from transformers import TrainerCallback

    if lora_rank or pooling != "mean":
        raise UserError("FlagEmbedding's trainer of encoders has no LoRA here: take --pooling mean and --lora_rank 0")
    data = Path(folder) / "flag_embedding.jsonl"
    data.parent.mkdir(parents=True, exist_ok=True)
    records = [record for _, record in read_records(train_file)]
    lines = [json.dumps({"query": r["query"], "pos": [r["pos_doc"]], "neg": []}) + "\n" for r in records]
    data.write_text("".join(lines), encoding="utf-8")
    runner = EncoderOnlyEmbedderRunner(
        model_args=EncoderOnlyEmbedderModelArguments(model_name_or_path=model),
        data_args=EncoderOnlyEmbedderDataArguments(
            train_data=[str(data)],
            cache_path=str(Path(folder) / "flag_embedding_cache"),
            train_group_size=1,
            query_max_len=max_length,
            passage_max_len=max_length,
        ),
        training_args=EncoderOnlyEmbedderTrainingArguments(
            output_dir=str(Path(folder) / "flag_embedding"),
            max_steps=max_steps,
            bf16=bf16,
            use_cpu=True,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            lr_scheduler_type="constant",
            weight_decay=0.01,
            temperature=temperature,
            sentence_pooling_method=pooling,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_strategy="no",
        ),
    )
    steps = Steps(skip_steps)

    class Timer(TrainerCallback):
        def on_step_end(self, *_, **__):
            steps.end()

    def count(_, __, named):
        sides = [named["queries"], named["passages"]]
        steps.add(sum(int(side["attention_mask"].sum()) for side in sides))

    runner.model.register_forward_pre_hook(count, with_kwargs=True)
    runner.trainer.add_callback(Timer())
    runner.run()
    return steps.result()
