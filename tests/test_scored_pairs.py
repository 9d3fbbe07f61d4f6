"""Scored pairs: their losses, what files of them must be, and the rank correlation in validation."""

import json

import pytest
import torch
from loss_reference import scored_reference
from scipy.stats import spearmanr
from store_material import tokenizer, write_jsonl  # noqa: F401
from tiny import check, launch, make_model, make_training_file, write_scored_pairs

from ds_embed.data.forms import Reading, read_training_records
from ds_embed.data.store import TrainingStore, build_training_store
from ds_embed.data.tokenize import TextFormat
from ds_embed.losses.scored import scored_loss
from ds_embed.settings import DataArguments, StepArguments
from ds_embed.training.prepare import check_store
from ds_embed.vectors.embedder import Embedder

SCORED = Reading(kinds=("scored",))


@pytest.mark.parametrize("loss", ["cosent", "angle", "cosine"])
def test_losses_are_those_of_sentence_transformers(loss):
    from sentence_transformers import losses

    torch.manual_seed(0)
    table = torch.nn.functional.normalize(torch.randn(22, 16, dtype=torch.float64), dim=1)
    scores, rows = torch.randint(0, 4, (11,)) / 4, torch.randperm(22).view(2, 11)
    ours = [
        scored_loss(table, rows, scores, block, loss=loss, temperature=0.05, weight=2.0)
        for block in (slice(0, 4), slice(4, 4), slice(4, 11))
    ]
    total, gradient = sum(part.sums.loss for part in ours), sum(part.gradient for part in ours)
    leaf = table.clone().requires_grad_()
    expected = scored_reference(*leaf[rows], scores.double(), loss, 0.05)
    expected.backward()
    assert total.item() == pytest.approx(2 * expected.item(), rel=1e-12)
    around = (leaf.grad * table).sum(1, keepdim=True)  # along a unit vector a loss of cosines has no gradient
    assert torch.allclose(gradient / 2, leaf.grad - around * table, rtol=1e-9, atol=1e-12)
    kinds = {"cosent": losses.CoSENTLoss, "angle": losses.AnglELoss, "cosine": losses.CosineSimilarityLoss}
    theirs = kinds[loss](model=None).compute_loss_from_embeddings(list(table[rows]), scores.double())
    assert theirs.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("loss", ["cosent", "angle", "cosine"])
def test_no_wait_for_the_device(loss):
    """On torch's meta device any look at a value raises."""
    table, scores = torch.empty(22, 16, device="meta"), torch.empty(11, device="meta")
    rows = torch.empty(2, 11, dtype=torch.int64, device="meta")
    result = scored_loss(table, rows, scores, slice(2, 5), loss=loss, temperature=0.05, weight=1.0)
    assert result.gradient.shape == (22, 16) and result.sums.loss.shape == ()


GOOD = [{"sentence1": f"a w{n}", "sentence2": f"b w{n}", "score": n / 4} for n in range(4)]
BAD = {
    "no score": (GOOD[:1] + [{"sentence1": "a", "sentence2": "b"}], ":2: score is missing"),
    "a null": (GOOD[:1] + [GOOD[1] | {"score": None}], ":2: score is null, expected a finite number"),
    "a word": (GOOD[:1] + [GOOD[1] | {"score": "high"}], ":2: score is 'high', expected a finite number"),
    "not finite": (GOOD[:1] + [GOOD[1] | {"score": "nan"}], ":2: score is a number, expected a finite number"),
    "blank": ([GOOD[0] | {"sentence2": " "}], ":1: sentence2 is blank"),
    "another form": (
        GOOD + [{"query": "a", "pos_doc": "b"}],
        ":5: a record of our own, and those before it are scored",
    ),
    "one score": ([row | {"score": 1} for row in GOOD], "every pair has the score 1, so there is nothing to learn"),
    "no cosine": ([row | {"score": 9 * row["score"]} for row in GOOD], "--pair_loss cosine: .* from 0 to 6.75"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused(name, tmp_path, tokenizer):
    records, message = BAD[name]
    path = write_jsonl(tmp_path / "pairs.jsonl", records)
    form = TextFormat("", 32, False)
    with pytest.raises(ValueError, match=message):
        store = build_training_store([path], tokenizer, form, form, 0, tmp_path / "cache", reading=SCORED)
        check_store(
            TrainingStore.open(store), DataArguments(train_files=[str(path)]), StepArguments(pair_loss="cosine")
        )


def test_read_in_every_form(tmp_path):
    ours = [{"query": row["sentence1"], "pos_doc": row["sentence2"], "score": row["score"]} for row in GOOD]
    texts = [{"text1": row["sentence1"], "text2": row["sentence2"], "score": row["score"]} for row in GOOD]
    table = "A\tB\tgrade\tscore\n" + "".join(f"{r['sentence1']}\t{r['sentence2']}\t{r['score']}\tx\n" for r in GOOD)
    (tmp_path / "table.tsv").write_text(table)
    columns = Reading(("query=A", "pos_doc=B", "score=grade"), kinds=("scored",))
    paths = [write_jsonl(tmp_path / f"{n}.jsonl", rows) for n, rows in enumerate((GOOD, ours, texts))]
    read = [[record for _, record in read_training_records([path], SCORED)] for path in paths]
    read.append([record for _, record in read_training_records([tmp_path / "table.tsv"], columns)])
    assert all(records == read[0] for records in read)
    assert [(record.query, record.pos_doc, record.pos_score) for record in read[0]][1] == ("a w1", "b w1", 0.25)
    # Where scores are not asked for, a pair of ours is a query and its right document, and sentences are none.
    assert next(read_training_records([paths[1]]))[1].pos_score is None
    with pytest.raises(ValueError, match=":1: the keys here are those of scored pairs: "):
        next(read_training_records([paths[0]]))


def test_training_and_validation(tmp_path):
    model = make_model(tmp_path / "model", "bert")
    pairs = write_scored_pairs(tmp_path / "pairs.jsonl", 60)
    held_out = write_scored_pairs(tmp_path / "held_out.jsonl", 21, seed=9)
    records = make_training_file(tmp_path / "records.jsonl", 40, num_negatives=1)

    def train(files, *more):
        flags = [
            *("--deepspeed", "zero0", "--model_name_or_path", model, "--train_files", *files),
            *("--output_dir", tmp_path / "run", "--cache_dir", tmp_path / "cache", "--max_steps", 3),
            *("--global_batch_size", 8, "--report_to", "none", "--bf16", "false", "--hard_negatives", 1, *more),
        ]
        return launch(0, "recipes/train_bert.py", *flags, "--pair_loss", "cosent")

    assert "--pair_loss cosent: no file of --train_files has scored pairs" in train([records]).stderr
    check(train([records, pairs], "--val_files", records, held_out))
    lines = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]
    assert [line["accuracy"] is None for line in lines[:3]] == [False] * 3
    last = lines[-1]
    assert {"val_loss", "val_accuracy", "val_spearman"} <= last.keys()
    rows = [json.loads(line) for line in open(held_out)]
    embedder = Embedder.from_pretrained(str(tmp_path / "run"), dtype="float32")
    first = embedder.encode_queries([row["sentence1"] for row in rows])
    second = embedder.encode_documents([row["sentence2"] for row in rows])
    expected = spearmanr((first * second).sum(1), [row["score"] for row in rows]).statistic
    assert last["val_spearman"] == pytest.approx(expected, abs=1e-6)
