"""What sizing promises is what a real job takes: parameters, tensors, peak memory, bytes between ranks."""

import functools
import json
from dataclasses import replace

import pytest
import torch
import transformers
from tiny import MODELS, REPOSITORY, check, launch, make_model, make_training_file
from torch.utils.flop_counter import FlopCounterMode

from ds_embed.data.batch import assemble_batch
from ds_embed.data.order import SampleOrder
from ds_embed.data.store import TrainingStore, build_training_store
from ds_embed.data.tokenize import TextFormat
from ds_embed.models.attention import CausalAttention, EncoderAttention
from ds_embed.models.card import EmbeddingCard
from ds_embed.models.encoder import TextEncoder
from ds_embed.models.loading import build_encoder, find_model, load_config, load_tokenizer
from ds_embed.models.lora import add_lora
from ds_embed.settings import (
    SIZING_DEFAULTS,
    TRAINING_ARGUMENTS,
    LoraArguments,
    ModelArguments,
    RunArguments,
    SizingArguments,
    StepArguments,
    parse_arguments,
    resolve_deepspeed_config,
)
from ds_embed.tools.plan.job import Job, job_to_size, table
from ds_embed.tools.plan.measure import measure_model, measure_pass
from ds_embed.tools.plan.ranks import payloads, rank_memory

RANKS, QUERIES, LONGEST, BUDGET = 2, 16, 24, 192
# Gathers every weight whenever it is needed, and in small buckets.
TIGHT = dict(
    reduce_bucket_size=10000,
    stage3_param_persistence_threshold=0,
    stage3_prefetch_bucket_size=0,
    stage3_max_live_parameters=0,
    stage3_max_reuse_distance=0,
)
REUSE = dict(stage3_max_live_parameters=10**9, stage3_max_reuse_distance=10**9, stage3_prefetch_bucket_size=10**6)
CASES = {
    "warm_up": dict(zero=2, lora=0),
    "zero0": dict(zero=0, lora=0),
    "zero0_grad_cache": dict(zero=0, lora=0, grad_cache=True),
    "zero1": dict(zero=1, lora=0),
    "zero2_grad_cache": dict(zero=2, lora=0, grad_cache=True),
    "zero2_lora": dict(zero=2, lora=4),
    "zero3": dict(zero=3, lora=0),
    "zero3_lora_grad_cache": dict(zero=3, lora=4, grad_cache=True),
    "zero3_reuse": dict(zero=3, lora=4, grad_cache=True, more=REUSE),
}
CARD = EmbeddingCard("last", "", "", LONGEST, LONGEST, True, "", 0)
MEASURED = [name for name in CASES if name != "warm_up"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("sizing")
    size = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=4, vocab_size=2000)
    make_model(root / "model", "llama", **size)
    make_model(root / "tiny", "llama")
    make_training_file(root / "train.jsonl", 40, num_negatives=1)
    tokenizer = load_tokenizer(find_model(str(root / "model")), False)
    form = TextFormat("", LONGEST, True)
    store = build_training_store([root / "train.jsonl"], tokenizer, form, form, 1, root / "cache")
    return root, str(store)


@pytest.fixture(scope="module")
def measured(place):
    """What two ranks really took: for each rank, by case."""
    root, store = place
    cases = {}
    for name, case in CASES.items():
        path = root / f"{name}.json"
        path.write_text(json.dumps({"zero_optimization": {"stage": case["zero"]} | TIGHT | case.get("more", {})}))
        model = str(root / ("tiny" if name == "warm_up" else "model"))
        cases[name] = dict(
            deepspeed=str(path),
            store=store,
            model=model,
            bf16=True,
            checkpointing=False,
            budget=BUDGET,
            queries=QUERIES,
            hard_negatives=1,
            steps=2,
            grad_cache=case.get("grad_cache", False),
            lora=case["lora"],
        )
    (root / "cases.json").write_text(json.dumps(cases))
    check(launch(RANKS, "tests/workers/sizes.py", root / "cases.json", root / "out"))
    return [json.loads((root / f"out.{rank}").read_text()) for rank in range(RANKS)]


@functools.cache
def sizing_of(place, name) -> Job:
    root, path = place
    case, store = CASES[name], TrainingStore.open(path)
    config = resolve_deepspeed_config(str(root / f"{name}.json"), bf16=True, max_grad_norm=1.0)
    step = StepArguments(global_batch_size=QUERIES, micro_batch_tokens=BUDGET, grad_cache=case.get("grad_cache", False))
    order = SampleOrder(3, store.file_sizes)  # the second batch is the worker's last step
    batch = assemble_batch(store, order, first_sample=QUERIES, num_queries=QUERIES, hard_negatives=1)
    return Job(
        ModelArguments(str(root / "model")),
        LoraArguments(lora_rank=case["lora"]),
        step,
        RunArguments("", ""),
        config,
        load_config(find_model(str(root / "model")), False),
        CARD,
        int(store.lengths.max()),
        batch.lengths,
        "",
        None,
        num_ranks=RANKS,
        ranks_per_node=RANKS,
        on_gpu=False,
        is_packed=False,
        hardware=SizingArguments(),
    )


@pytest.mark.parametrize("name", MEASURED)
def test_tensors_and_bytes_between_ranks(place, measured, name):
    sizing, real = sizing_of(place, name), measured[0][name]
    sizes, zero = sizing.cost, CASES[name]["zero"]
    assert (real["all"], real["trained"]) == (sizes.num_all, sizes.num_trained)
    parts = sizing.memory(sizing.zero).phases["optimizer"]
    # Between steps: weights, AdamW's state (of the trained weights only), and the gradients that are kept allocated.
    kept = {0: 0, 1: 4 * sizes.num_trained, 2: 0, 3: 4 * sizes.num_trained / RANKS + 2 * TIGHT["reduce_bucket_size"]}
    assert real["stepped"] == pytest.approx(parts["weights"] + parts["optimizer"] + kept[zero], rel=0.02)
    payload = payloads(sizing.cost, sizing.zero, sizing.shape, False)
    wire = real["wire"]
    reduced = wire["all_reduce"] if zero < 3 else wire["reduce_scatter_tensor"]
    assert reduced == pytest.approx(payload["gradients"][0], rel=0.02)
    if zero:
        gathered = payload["updated weights"][0] if zero < 3 else payload["gathered weights"][0]
        # At most: the backward pass of a frozen embedding gathers nothing, nor does what stays for its reuse.
        least = 0.2 if "more" in CASES[name] else 0.85
        assert least * gathered < wire["all_gather_into_tensor"] < 1.02 * gathered
    # Rows are padded to those of the rank with most.
    assert wire["all_gather_single"] == pytest.approx(payload["embeddings"][0], rel=0.2)


@pytest.mark.parametrize("name", MEASURED)
def test_peak_memory(place, measured, name):
    sizing = sizing_of(place, name)
    expected = rank_memory(sizing.cost, sizing.zero, sizing.shape, on_gpu=False)
    assert max(rank[name]["peak"] for rank in measured) == pytest.approx(expected.peak, rel=0.2)
    # The table counts on a full micro-batch of the longest texts, which this step may not have.
    assert expected.peak <= sizing.memory(sizing.zero).peak


def test_zero3_loads_no_whole_model(place, measured):
    whole = 2 * measured[0]["zero3"]["all"]
    assert measured[0]["zero2_lora"]["loaded"] == pytest.approx(whole, rel=0.05)
    for rank in measured:
        assert rank["zero3"]["loaded"] == pytest.approx(whole / RANKS, rel=0.02)
    # The first rank maps the file into memory and hands out weight by weight; the others have their shards and a weight.
    for name in ("zero3", "zero3_lora_grad_cache"):
        assert measured[1][name]["loading_peak"] < 0.8 * whole


@pytest.mark.parametrize("kind, lora, checkpointing", [("llama", 4, True), ("llama", 0, False), ("bert", 0, False)])
def test_counts_are_those_of_real_tensors(kind, lora, checkpointing):
    config_class, settings = MODELS[kind]
    config = getattr(transformers, config_class)(**(settings | dict(hidden_size=256, num_hidden_layers=4)))
    card = replace(CARD, pooling="last" if kind == "llama" else "mean", bidirectional=kind == "bert")
    arguments = LoraArguments(lora_rank=lora)
    cost = measure_model(
        config,
        card,
        ModelArguments(""),
        arguments,
        StepArguments(gradient_checkpointing=checkpointing),
        bf16=True,
        num_tokens=32,
        on_gpu=True,
    )
    options = {} if kind == "llama" else {"add_pooling_layer": False}
    attention = CausalAttention("sdpa") if kind == "llama" else EncoderAttention()
    kind_of_attention = {"bidirectional": card.bidirectional, "attn_implementation": None}
    encoder = build_encoder(config, pooling=card.pooling, bf16=True, trust_remote_code=False, **kind_of_attention)
    if checkpointing:
        encoder.backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if lora:
        add_lora(encoder, arguments, seed=0, dtype=torch.bfloat16)
    encoder.train()
    assert cost.num_all == sum(p.numel() for p in encoder.parameters())
    assert cost.num_trained == sum(p.numel() for p in encoder.parameters() if p.requires_grad)
    for parameter in encoder.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    # Five texts, which were not measured: bytes are linear in the number of texts.
    real = measure_pass(encoder, 5, 32)
    assert cost.of_tokens("kept_bytes", 5 * 32) == pytest.approx(real.kept_bytes, rel=0.05)
    assert cost.of_tokens("peak_bytes", 5 * 32) == pytest.approx(real.peak_bytes, rel=0.05)
    # Attention written out is made of products that torch counts; the fused kernel's backward has one product more.
    eager = transformers.AutoModel.from_config(config, attn_implementation="eager", dtype=torch.bfloat16, **options)
    plain = TextEncoder(eager, card.pooling, attention, check_attention=False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        plain(torch.zeros(5, 24, dtype=torch.long), torch.full((5,), 24))
    if not lora:
        assert 5 * cost.flops("forward_flops", 24) == pytest.approx(counter.get_total_flops(), rel=0.002)
        attention = 4 * config.num_hidden_layers * config.hidden_size * 24**2 * 5
        assert 5 * cost.flops("flops", 24) == pytest.approx(3 * counter.get_total_flops() + attention / 2, rel=0.002)


def plan_of(place, *flags):
    argv = ["--model_name_or_path", str(place[0] / "tiny"), "--max_length", "32", *flags]
    return table(
        job_to_size(
            None, *parse_arguments(*TRAINING_ARGUMENTS[:-1], SizingArguments, argv=argv, defaults=SIZING_DEFAULTS)
        )
    )


@pytest.mark.parametrize("path", sorted(REPOSITORY.glob("ds_configs/*.json")), ids=lambda path: path.stem)
def test_every_configuration_has_a_plan(place, path):
    text = plan_of(place, "--deepspeed", str(path), "--num_gpus", "8", "--num_records", "6400", "--hard_negatives", "1")
    assert "(yours)" in text and "100 steps" in text and "Assumed: 41% of 989 TFLOP/s" in text
    rows = [line for line in text.splitlines() if line.startswith("ZeRO-") and line.split()[-3] in ("yes", "no")]
    assert len({row[:40].replace("(yours)", "").strip() for row in rows}) == len(rows) >= 8


def test_what_does_not_fit_is_said_and_a_budget_fits(place, measured):
    def row(gib):
        job = ["--grad_cache", "true", "--deepspeed", "ds_configs/zero0.json", "--gpu_memory_gb", str(gib)]
        return next(line for line in plan_of(place, *job).splitlines() if "(yours)" in line).split()

    assert row(1.6)[-3] == "yes" and row(1.501)[-3] == "no"
    sizing = sizing_of(place, "zero2_grad_cache")
    for texts in (1, 3):
        peak = sizing.memory(sizing.zero, texts * LONGEST).peak
        assert sizing.largest_budget(sizing.zero, peak) == texts * LONGEST
        assert sizing.largest_budget(sizing.zero, peak - 1) == (None if texts == 1 else 2 * LONGEST)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--efficiency", "2"], ["--efficiency 2.0", "at most 1"]),
        (["--num_gpus", "12"], ["--num_gpus 12", "--gpus_per_node 8"]),
        (["--num_gpus", "0"], ["--num_gpus 0"]),
        (["--micro_batch_tokens", "20"], ["--micro_batch_tokens 20", "at least 32"]),
        (["--num_gpus", "4", "--deepspeed", "ds_configs/zero3_hpz.json"], ["zero_hpz_partition_size", "4 rank(s)"]),
        (["--lora_target_modules", "q_projj"], ["--lora_target_modules q_projj", "q_proj"]),
    ],
)
def test_mistakes(place, flags, words):
    with pytest.raises(ValueError) as error:
        plan_of(place, *flags)
    assert not [word for word in words if word not in str(error.value)], error.value


def test_dry_run_and_plan_as_commands(place, tmp_path):
    root, _ = place
    flags = [
        "--deepspeed",
        "ds_configs/zero2.json",
        "--model_name_or_path",
        root / "tiny",
        "--max_length",
        32,
        "--train_files",
        root / "train.jsonl",
        "--cache_dir",
        root / "cache",
        "--global_batch_size",
        8,
        "--output_dir",
        tmp_path / "run",
        "--num_train_epochs",
        2,
    ]
    dry = check(launch(RANKS, "recipes/train_gpt.py", *flags, "--dry_run", "true"))
    assert not (tmp_path / "run").exists()
    assert (dry.stdout + dry.stderr).count("dry run: nothing was loaded") == 1
    assert "The ranks here are CPUs, and all times are those of GPUs of 989 TFLOP/s" in dry.stdout + dry.stderr
    plan = check(launch(0, "recipes/plan.py", *flags, "--num_gpus", RANKS)).stdout
    first = [line for line in (dry.stdout + dry.stderr).splitlines() if line.startswith(("weights  ", "10 steps"))]
    assert len(first) >= 2 and plan.count("(yours)") == 1
    assert first[0] in plan
