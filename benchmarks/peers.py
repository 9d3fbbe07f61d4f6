"""The alternatives to ds_embed, used as in their own documentation: contestants that run in separate processes.

All of them count tokens as ones in the attention mask, and time whole steps after the first `skip_steps`.
"""

import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from ds_embed.data.files import read_records


def train_sentence_transformers(
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
    cached: bool,
    mini_batch_size: int,
    mini_batch_num_tokens: int | None = None,
    grouped: bool = False,
    seed: int = 42,
    hard_negatives: int = 0,
    warmup_steps: int = 0,
    evaluate: Callable[[Any, int], None] | None = None,
    eval_steps: int = 0,
) -> dict:
    """Its trainer with (Cached)MultipleNegativesRankingLoss, in fp32, or bf16 by autocast.

    grouped: batches contain documents of similar length, each at most once. evaluate(model, step) is called before the
    first step and after each `eval_steps`, without being timed.
    """
    import torch
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.base.sampler import BatchSamplers, DefaultBatchSampler
    from sentence_transformers.sentence_transformer import losses
    from transformers import TrainerCallback

    # Without a dtype, weights are loaded as stored, possibly in bfloat16.
    transformer = sentence_transformer(model, pooling, max_length, None if bf16 else torch.float32)
    if lora_rank:
        transformer.add_adapter(lora_config(lora_rank))
    records = [record for _, record in read_records(train_file)]
    data = Dataset.from_list(
        [
            {"anchor": r["query"], "positive": r["pos_doc"]}
            | {f"negative_{k}": r["neg_doc"][k] for k in range(hard_negatives)}
            for r in records
        ]
    )
    lengths = list(
        map(
            len,
            transformer.tokenizer([r["pos_doc"] for r in records], truncation=True, max_length=max_length)["input_ids"],
        )
    )

    class GroupedByLength(DefaultBatchSampler):
        def __iter__(self):
            """First uses of documents by length, then second uses, and so on, cut into batches, which are shuffled."""
            rng, uses, places = random.Random(self.seed + self.epoch), Counter(), {}
            for index in rng.sample(range(len(records)), len(records)):
                document = records[index]["pos_doc"]
                places[index] = (uses[document], lengths[index])
                uses[document] += 1
            order = sorted(places, key=places.get)
            batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
            whole = [batch for batch in batches if len(batch) == batch_size]
            return iter(rng.sample(whole, len(whole)))

    scale = 1 / temperature
    if cached:
        loss = losses.CachedMultipleNegativesRankingLoss(
            transformer, scale=scale, mini_batch_size=mini_batch_size, mini_batch_num_tokens=mini_batch_num_tokens
        )
    else:
        loss = losses.MultipleNegativesRankingLoss(transformer, scale=scale)
    steps = Steps(skip_steps)
    loss.register_forward_pre_hook(
        lambda module, inputs, named: steps.add(_count_masks([*inputs, *named.values()])), with_kwargs=True
    )

    class Timer(TrainerCallback):
        def on_train_begin(self, *_, **__):
            if evaluate:
                evaluate(transformer, 0)
                steps.restart()

        def on_step_end(self, _, state, *__, **___):
            steps.end()
            if evaluate and state.global_step % eval_steps == 0:
                evaluate(transformer, state.global_step)
                transformer.train()
                steps.restart()

    arguments = SentenceTransformerTrainingArguments(
        output_dir=folder,
        max_steps=max_steps,
        per_device_train_batch_size=batch_size,
        bf16=bf16,
        use_cpu=True,
        learning_rate=learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=warmup_steps,
        weight_decay=0.01,
        seed=seed,
        dataloader_drop_last=grouped,
        batch_sampler=GroupedByLength if grouped else BatchSamplers.BATCH_SAMPLER,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
    )
    SentenceTransformerTrainer(
        model=transformer, args=arguments, train_dataset=data, loss=loss, callbacks=[Timer()]
    ).train()
    return steps.result()


def train_bare_loop(
    *,
    model: str,
    store: str,
    batch_size: int,
    micro_batch_tokens: int,
    max_steps: int,
    skip_steps: int,
    learning_rate: float,
    temperature: float,
    pooling: str,
    lora_rank: int,
    grad_cache: bool,
    seed: int,
    our_kernels: bool,
) -> dict:
    """A loop around a Hugging Face model in bfloat16 with AdamW; of ours it only uses batches and micro-batches.

    our_kernels: also use our attention, dropout and products, so that the remaining difference is the overhead of
    DeepSpeed and ds_embed.
    """
    import torch
    from transformers import AutoModel

    from ds_embed.data.batch import assemble_batch, collate
    from ds_embed.data.order import SampleOrder
    from ds_embed.data.plan import plan_micro_batches
    from ds_embed.data.store import TrainingStore
    from ds_embed.models.cpu import MATH_KERNEL, use_cpu_dropout, use_kernels

    tokens = TrainingStore.open(store)
    order = SampleOrder(seed, tokens.file_sizes)
    if our_kernels:
        use_kernels()
    kernel = {"attn_implementation": MATH_KERNEL} if our_kernels else {}
    backbone = AutoModel.from_pretrained(model, dtype=torch.bfloat16, **kernel).train()
    if lora_rank:
        from peft import get_peft_model

        backbone = get_peft_model(backbone, lora_config(lora_rank))
    if our_kernels:
        use_cpu_dropout(backbone)
    trained = [p for p in backbone.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.01, fused=True)
    steps = Steps(skip_steps)

    def encode(texts) -> torch.Tensor:
        ids, lengths = (torch.from_numpy(array) for array in collate(tokens, texts))
        mask = torch.arange(ids.shape[1])[None] < lengths[:, None]
        states = backbone(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        if pooling == "last":
            vectors = states[torch.arange(len(ids)), lengths - 1]
        else:
            vectors = (states * mask[:, :, None]).sum(1) / lengths[:, None]
        return torch.nn.functional.normalize(vectors.float(), dim=1)

    def loss_of(pieces: list[torch.Tensor], positions: torch.Tensor) -> torch.Tensor:
        table = torch.cat(pieces)[positions]
        scores = table[:batch_size] @ table[batch_size:].T / temperature
        return torch.nn.functional.cross_entropy(scores, torch.arange(batch_size))

    for number in range(max_steps):
        batch = assemble_batch(
            tokens, order, first_sample=number * batch_size, num_queries=batch_size, hard_negatives=0
        )
        texts, lengths = batch.texts[batch.rows], batch.lengths[batch.rows]  # every use, since peers encode each
        (parts,) = plan_micro_batches(lengths, micro_batch_tokens, 1).micro_batches
        positions = torch.argsort(torch.cat([torch.from_numpy(part) for part in parts]))
        if grad_cache:
            states = []
            with torch.no_grad():
                pieces = []
                for part in parts:
                    states.append(torch.get_rng_state())
                    pieces.append(encode(texts[part]))
            leaves = [piece.requires_grad_() for piece in pieces]
            loss_of(leaves, positions).backward()
            for part, leaf, state in zip(parts, leaves, states):
                torch.set_rng_state(state)
                encode(texts[part]).backward(leaf.grad)
        else:
            loss_of([encode(texts[part]) for part in parts], positions).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps.add(int(lengths.sum()))
        steps.end()
    return steps.result()


def encode_sentence_transformers(*, model: str, text_file: str, pooling: str, max_length: int, bf16: bool) -> dict:
    """`SentenceTransformer.encode` for the texts of a file, with its defaults: batches of 32, sorted by length."""
    import torch

    transformer = sentence_transformer(model, pooling, max_length, torch.bfloat16 if bf16 else torch.float32)
    texts = read_texts(text_file)
    transformer.encode(texts[:64])
    started = time.perf_counter()
    transformer.encode(texts)
    seconds = time.perf_counter() - started
    num_tokens = sum(map(len, transformer.tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]))
    return {"tokens_per_second": num_tokens / seconds, "seconds": seconds, "num_tokens": num_tokens}


def sentence_transformer(model: str, pooling: str, max_length: int, dtype: Any = None) -> Any:
    """The model as loaded by sentence-transformers, with the given pooling, on the CPU."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    named = {} if dtype is None else {"model_kwargs": {"dtype": dtype}}
    backbone = Transformer(model, max_seq_length=max_length, **named)
    assert dtype in (None, backbone.auto_model.dtype)
    pooled = Pooling(backbone.get_embedding_dimension(), {"last": "lasttoken"}.get(pooling, pooling))
    return SentenceTransformer(modules=[backbone, pooled, Normalize()], device="cpu")


def lora_config(rank: int) -> Any:
    from peft import LoraConfig

    return LoraConfig(task_type="FEATURE_EXTRACTION", r=rank, lora_alpha=2 * rank, target_modules="all-linear")


def read_texts(path: str) -> list[str]:
    """The documents in a file."""
    return [record["pos_doc"] for _, record in read_records(path)]


def _count_masks(values: list) -> int:
    """Number of ones in the attention masks of (features of anchors, features of positives)."""
    (features,) = [value for value in values if isinstance(value, (list, tuple)) and isinstance(value[0], dict)]
    return sum(int(side["attention_mask"].sum()) for side in features)


class Steps:
    """Tokens and seconds of a loop's steps, each timed from the end of the previous one."""

    def __init__(self, skip_steps: int):
        self.skip_steps = skip_steps
        self.seconds: list[float] = []
        self.num_tokens: list[int] = []
        self._last = time.perf_counter()

    def add(self, num_tokens: int) -> None:
        self.num_tokens.append(num_tokens)

    def restart(self) -> None:
        self._last = time.perf_counter()

    def end(self) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now

    def result(self) -> dict:
        assert len(self.seconds) == len(self.num_tokens) > self.skip_steps
        seconds, num_tokens = sum(self.seconds[self.skip_steps :]), sum(self.num_tokens[self.skip_steps :])
        rate = num_tokens / seconds
        return {
            "tokens_per_second": rate,
            "seconds": seconds,
            "num_tokens": num_tokens,
            "each_step": list(zip(self.seconds, self.num_tokens)),
        }
