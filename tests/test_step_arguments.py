"""Settings of the loss that can't work are refused with the flag and the value."""

import pytest

from ds_embed.settings import BERT_DEFAULTS, StepArguments, parse_arguments
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
