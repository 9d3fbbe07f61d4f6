"""Settings of the loss that can't work are refused with the flag and the value."""

import pytest

from ds_embed.settings import (
    BERT_DEFAULTS,
    DryRunArguments,
    ModelArguments,
    OptimizerArguments,
    RunArguments,
    SizingArguments,
    StepArguments,
    TextArguments,
    ValidationArguments,
    parse_arguments,
)
from ds_embed.settings.errors import UserError
from ds_embed.settings.reranker_arguments import RerankerStepArguments, RerankerValidationArguments
from ds_embed.settings.tool_arguments import MiningArguments, SearchIndexArguments
from ds_embed.tools.convert.job import ConvertArguments
from ds_embed.tools.evaluate import EvaluateArguments
from ds_embed.training.prepare import check_prefixes
from ds_embed.training.step import loss_options

CASES = {
    "--label_smoothing 1.0": dict(label_smoothing=1.0),
    "--label_smoothing -0.1": dict(label_smoothing=-0.1),
    "--false_negative_margin 2.5": dict(false_negative_margin=2.5),
    "--temperature 0.005: .* at least 0.01": dict(temperature=0.005, learnable_temperature=True),
    "--matryoshka_dims 8 8": dict(matryoshka_dims=[8, 8]),
    "--matryoshka_dims 0 8": dict(matryoshka_dims=[0, 8]),
    "--matryoshka_weights 1.0: has 1 values, but --matryoshka_dims has 2": dict(
        matryoshka_dims=[4, 8], matryoshka_weights=[1.0]
    ),
    "--matryoshka_weights 0.0 1.0: each": dict(matryoshka_dims=[4, 8], matryoshka_weights=[0.0, 1.0]),
    "--matryoshka_weights 1.0: has 1 values, but --matryoshka_dims has 0": dict(matryoshka_weights=[1.0]),
    "--distillation_weight -1": dict(distillation_weight=-1.0),
    "--distillation_temperature 0": dict(distillation_temperature=0.0),
    "--negatives none": dict(negatives="none"),
    "--hardness_weight -1.0: must be at least 0": dict(hardness_weight=-1.0),
    "--hardness_weight inf: must be a number": dict(hardness_weight=float("inf")),
    "--directions query_answer: choose one of query_document, document_query": dict(directions=["query_answer"]),
    "--directions query_query: must contain query_document": dict(directions=["query_query"]),
    "--directions : must contain query_document": dict(directions=[]),
    "--directions query_document query_document: .* each name once": dict(directions=["query_document"] * 2),
    "--directions query_document query_query: .*leave out --symmetric, or --directions": dict(
        directions=["query_document", "query_query"], symmetric=True
    ),
    "--directions query_document query_query: has no meaning with --negatives pair": dict(
        directions=["query_document", "query_query"], negatives="pair"
    ),
    "--directions .* has no meaning with --negatives pair.*set --negatives own": dict(
        directions=["query_document", "document_document"], negatives_per_file=["all", "pair"]
    ),
    "--distillation_loss mse: choose one of kl, margin_mse": dict(distillation_loss="mse", distillation_weight=1.0),
    "--distillation_loss margin_mse: has no effect without --distillation_weight": dict(distillation_loss="margin_mse"),
}


@pytest.mark.parametrize("message", CASES)
def test_refused(message):
    with pytest.raises(ValueError, match=message):
        StepArguments(**CASES[message])


FILE = __file__  # any that exists
MINE, CONVERT = dict(train_files=[FILE], output_file="none"), dict(input=[FILE], output="none")
RUN = dict(output_dir="none", deepspeed="zero2")
UNUSED = [
    (
        StepArguments,
        dict(pair_temperature=0.1),
        "--pair_temperature 0.1: has no effect without --pair_loss cosent or angle",
    ),
    (
        StepArguments,
        dict(pair_temperature=0.1, pair_loss="cosine"),
        "--pair_temperature 0.1: has no effect without --pair_",
    ),
    (StepArguments, dict(distillation_temperature=2.0), "--distillation_temperature 2.0: has no effect without --dist"),
    (RerankerStepArguments, dict(distillation_temperature=2.0), "--distillation_temperature 2.0: .* without --loss kl"),
    (
        OptimizerArguments,
        dict(min_learning_rate=1e-6, lr_scheduler="constant"),
        "--min_learning_rate 1e-06: has no effect without --lr_scheduler cosine or linear or --constant_steps; add that or",
    ),
    (RunArguments, RUN | dict(run_name="a"), "--run_name a: has no effect without --report_to wandb or comet"),
    (
        ValidationArguments,
        dict(save_top_k=3),
        "--save_top_k 3: has no effect without --val_files or --val_query_files or",
    ),
    (
        RerankerValidationArguments,
        dict(best_metric="val_loss"),
        "--best_metric val_loss: has no effect without --val_files",
    ),
    (DryRunArguments, dict(gpu_tflops=100.0), "--gpu_tflops 100.0: has no effect without --dry_run"),
    (
        SearchIndexArguments,
        dict(hnsw_ef_search=9),
        "--hnsw_ef_search 9: has no effect without --index hnsw or --index_file",
    ),
    (SearchIndexArguments, dict(index="hnsw", ivf_lists=9), "--ivf_lists 9: has no effect without --index ivf"),
    (MiningArguments, MINE | dict(bm25_k1=2.0), "--bm25_k1 2.0: has no effect without --method bm25"),
    (MiningArguments, MINE | dict(seed=1), "--seed 1: has no effect without --sampling random"),
    (MiningArguments, MINE | dict(cross_encoder_bf16=True), "--cross_encoder_bf16 true: .* without --cross_encoder"),
    (EvaluateArguments, dict(embeddings="a", qrels="b", rescore_multiplier=2), ".* without --quantize binary"),
    (EvaluateArguments, dict(run_file="a", qrels="b", top_k=9), "--top_k 9: has no effect without --embeddings"),
]
UNUSED += [
    (ConvertArguments, CONVERT | dict(input_format="training", output_format="pairs") | flags, message)
    for flags, message in (
        (dict(num_negatives=2), "--num_negatives 2: has no effect without --output_format triplets"),
        (dict(split="dev"), "--split dev: has no effect without --input_format beir or --output_format beir"),
        (
            dict(join_titles=False),
            "--join_titles false: has no effect without --input_format beir or --output_format doc",
        ),
    )
]


@pytest.mark.parametrize(("arguments", "given", "message"), UNUSED, ids=range(len(UNUSED)))
def test_settings_that_nothing_reads_are_refused(arguments, given, message):
    with pytest.raises(UserError, match=message):
        arguments(**given)


def test_settings_that_something_reads_are_taken():
    StepArguments(pair_temperature=0.1, pair_loss="angle")
    RerankerStepArguments(distillation_temperature=2.0, loss="kl")
    OptimizerArguments(min_learning_rate=1e-6, lr_scheduler="constant", constant_steps=5)
    ValidationArguments(val_files=[FILE], save_top_k=3, val_each_epoch=True, early_stopping_patience=2)
    DryRunArguments(gpu_tflops=100.0, dry_run=True)
    SizingArguments(gpu_tflops=100.0)  # has no dry run
    MiningArguments(**MINE, method="bm25", bm25_k1=2.0)
    ConvertArguments(**CONVERT, input_format="training", output_format="triplets", num_negatives=2)


def test_mining_without_a_model_reads_nothing_of_one():
    text = TextArguments()
    for model, given, deepspeed, message in (
        (ModelArguments("", pooling="cls"), text, None, "--pooling cls: has no effect without --model_name_or_path"),
        (
            ModelArguments(""),
            TextArguments(max_length=9),
            None,
            "--max_length 9: has no effect without --model_name_or_p",
        ),
        (ModelArguments(""), text, "zero3", "--deepspeed zero3: has no effect without --model_name_or_path"),
    ):
        with pytest.raises(UserError, match=message):
            MiningArguments(**MINE, method="bm25", deepspeed=deepspeed).check_model(model, given)


def test_prefixes_must_include_the_whole_embedding():
    check_prefixes(StepArguments(matryoshka_dims=[32, 8]), 32)
    check_prefixes(StepArguments(), 32)
    for dims in ([8, 16], [8, 64]):
        with pytest.raises(ValueError, match=f"--matryoshka_dims {dims[0]} {dims[1]}: the largest must be 32"):
            check_prefixes(StepArguments(matryoshka_dims=dims), 32)


def test_from_flags_and_file(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("matryoshka_dims: [32, 8]\nmatryoshka_weights: []\nlabel_smoothing: 1e-1\nsymmetric: true\n")
    argv = ["--config", str(file), "--false_negative_margin", "-0.05", "--symmetric", "false"]
    (step,) = parse_arguments(StepArguments, argv=argv, defaults={"negatives": BERT_DEFAULTS["negatives"]})
    options = loss_options(step, step.negatives)
    assert options.matryoshka_dims == (32, 8) and options.matryoshka_weights == (1.0, 1.0)
    assert (options.negatives, options.label_smoothing, options.symmetric) == ("own", 0.1, False)
    assert options.false_negative_margin == -0.05
