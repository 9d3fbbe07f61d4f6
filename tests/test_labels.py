"""Labelled texts as pairs: positives of the label, negatives of other labels, drawn as a pure function of seed and place."""

import json

import numpy as np
import pytest
from store_material import tokenizer, write_jsonl  # noqa: F401
from tiny import check, launch, make_model, make_training_file, write_labelled_texts

from ds_embed.data.batch import assemble_batch
from ds_embed.data.forms import Reading, read_training_records
from ds_embed.data.order import SampleOrder
from ds_embed.data.store import TrainingStore, build_training_store
from ds_embed.data.tokenize import TextFormat
from ds_embed.settings import DataArguments, StepArguments
from ds_embed.training.prepare import check_store

LABELS = Reading(kinds=("labels",))


def store_of(paths, tokenizer, folder, reading=LABELS):
    form = TextFormat("", 64, False)
    return TrainingStore.open(build_training_store(paths, tokenizer, form, form, 2, folder / "cache", reading=reading))


def test_positives_share_the_label_and_negatives_never(tmp_path, tokenizer):
    paths = [write_labelled_texts(tmp_path / f"{n}.jsonl", 30 + n, seed=n) for n in range(2)]
    records = make_training_file(tmp_path / "records.jsonl", 30, num_negatives=1)
    store = store_of([*paths, records], tokenizer, tmp_path)
    rows = [(n, json.loads(line)) for n, path in enumerate(paths) for line in open(path)]
    labels = [(number, row["label"]) for number, row in rows] + [None] * 30
    record_of = np.repeat(np.arange(store.num_records), np.diff(store.first_text))
    order, positives = SampleOrder(5, store.file_sizes), []
    for first in range(0, 4 * 91, 24):
        batch = assemble_batch(store, order, first_sample=first, num_queries=24, hard_negatives=3)
        documents = [labels[record] for record in record_of[batch.uses[24:]]]
        texts = store.text_keys[batch.uses[24:]]
        pairs = set(map(tuple, batch.positive_pairs.tolist()))
        for query, record in enumerate(batch.records):
            label = labels[record]
            if label is None:
                continue
            own = store.text_keys[store.first_text[record] + 1]
            assert documents[query] == label and batch.uses[24 + query] != store.first_text[record] + 1
            positives.append((int(record), int(batch.uses[24 + query])))
            for document, other in enumerate(documents):
                is_masked = (batch.document_keys[document] == batch.document_keys[query]).any()
                is_masked |= (query, document) in pairs
                own_or_same = texts[document] in (texts[query], own)
                assert is_masked == (other == label or own_or_same), (label, other)
            chosen = batch.own_negatives[query]
            assert all(documents[d][0] == label[0] and documents[d][1] != label[1] for d in chosen[chosen >= 0])
            assert (chosen >= 0).any()
        again = assemble_batch(store, order, first_sample=first + 5, num_queries=8, hard_negatives=3)
        assert (again.uses[8:16] == batch.uses[24 + 5 : 24 + 13]).all()
    assert len(set(positives)) > 2 * len({record for record, _ in positives})  # others in every pass


ROWS = [{"text": f"w{n} w{n + 1}", "label": n % 2} for n in range(6)]
BAD = {
    "no label": (ROWS[:1] + [{"text": "a"}], ":2: label is missing"),
    "a null": (ROWS[:1] + [{"text": "a", "label": None}], ":2: label is missing, expected the name or the number"),
    "a list": (ROWS[:1] + [{"text": "a", "label": ["x"]}], ":2: label is a list"),
    "blank": (ROWS[:1] + [{"text": "", "label": 1}], ":2: text is blank"),
    "stands once": ([*ROWS, {"text": "a", "label": "rare"}], ":7: no other text of its file has its label"),
    "one label": (ROWS[::2], ":1: every text of its file has this label"),
    "another form": (
        [*ROWS, {"query": "a", "pos_doc": "b"}],
        ":7: a record of our own, and those before it are labelled",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused(name, tmp_path, tokenizer):
    records, message = BAD[name]
    path = write_jsonl(tmp_path / "labels.jsonl", records)
    with pytest.raises(ValueError, match=message):
        check_store(store_of([path], tokenizer, tmp_path), DataArguments(train_files=[str(path)]), StepArguments())


def test_read_from_a_table(tmp_path):
    (tmp_path / "labels.csv").write_text('text,category\n"one, two",a\nthree,b\n')
    read = read_training_records([tmp_path / "labels.csv"], Reading(("label=category",), kinds=("labels",)))
    assert [(record.query, record.pos_doc, record.label) for _, record in read] == [
        ("one, two", "one, two", "a"),
        ("three", "three", "b"),
    ]


def test_a_query_with_a_judged_text_is_no_labelled_text(tmp_path):
    (tmp_path / "pairs.csv").write_text("query,text,label\nq,t,1\nq,u,0\n")
    with pytest.raises(
        ValueError, match="pairs.csv:2: pos_doc is missing, .* the keys here are 'query', 'text', 'label'"
    ):
        next(read_training_records([tmp_path / "pairs.csv"], Reading(kinds=("labels",))))


def test_others_refuse_labelled_texts(tmp_path):
    path = write_jsonl(tmp_path / "labels.jsonl", ROWS)
    with pytest.raises(ValueError, match=":1: the keys here are those of labelled texts: "):
        next(read_training_records([path]))


def test_a_run_from_yaml_with_settings_for_each_file(tmp_path):
    model = make_model(tmp_path / "model", "bert")
    labels = write_labelled_texts(tmp_path / "labels.jsonl", 40)
    records = make_training_file(tmp_path / "records.jsonl", 40, num_negatives=2)
    config = {
        "train_files": [
            {"path": str(labels), "negatives": "pair", "hard_negatives": 3, "temperature": 0.1, "weight": 1},
            {"path": str(records), "negatives": "all", "hard_negatives": 1, "temperature": "5e-2", "weight": 3},
        ]
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    flags = [
        *("--deepspeed", "zero0", "--model_name_or_path", model, "--cache_dir", tmp_path / "cache"),
        *("--config", tmp_path / "config.yaml", "--output_dir", tmp_path / "run"),
        *("--max_steps", "2", "--global_batch_size", "8", "--report_to", "none", "--bf16", "false"),
    ]
    said = check(launch(0, "recipes/train_bert.py", *flags)).stderr
    assert f"negatives pair, 3 of its own a query: {labels}" in said
    assert f"temperature 0.05: {records}" in said
