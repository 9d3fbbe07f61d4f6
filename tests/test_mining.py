"""Mined negatives against a plain float64 reference, rule by rule; candidates by BM25 and by a cross-encoder."""

import collections
import math

import numpy as np
import pytest
from mining_material import make_files, read_jsonl, reference, run, same, unit, write_jsonl, write_vectors
from tiny import launch, make_model, make_tokenizer, make_training_file

from ds_embed.settings import TextArguments
from ds_embed.settings.tool_arguments import MiningArguments
from ds_embed.tools.mine import job


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("mining")
    return root, *make_files(root)


RULES = {
    "none": {},
    "absolute": {"absolute_margin": 0.3},
    "relative": {"relative_margin": 0.2},
    "bounds": {"max_score": 0.5, "min_score": -0.1},
    "window": {"range_min": 3, "range_max": 9},
    "all": {"relative_margin": 0.1, "absolute_margin": 0.01, "max_score": 0.7, "min_score": -0.6, "range_min": 1},
    "many": {"num_negatives": 20, "range_max": 25, "absolute_margin": 0.1, "drop_without_negatives": True},
    "existing": {"keep_existing": True, "relative_margin": 0.05, "range_min": 1},
}


@pytest.mark.parametrize("rule", RULES)
def test_negatives_scores_and_counts_equal_the_reference(place, monkeypatch, rule):
    root, records, query_vectors, document_vectors = place
    monkeypatch.setattr(job, "CHUNK_QUERIES", 5)
    monkeypatch.setattr(job, "_RECORDS_AT_ONCE", 4)
    monkeypatch.setattr(job, "_FOUND_AT_ONCE", 120)
    settings = {"num_negatives": 4, "embeddings": str(root / "vectors"), **RULES[rule]}
    mined, summary = run(root, f"{rule}.jsonl", **settings)
    arguments = MiningArguments(train_files=[str(root / "train.jsonl")], output_file="x", **settings)
    expected = reference(records, query_vectors, document_vectors, arguments)

    kept = iter(mined)
    totals = collections.Counter()
    for record, (allowed, positive_score, dropped) in zip(records, expected):
        totals.update(dropped)
        own = record.get("neg_doc", []) if arguments.keep_existing else []
        own = [own] if isinstance(own, str) else own
        texts = own + [text for text, _ in allowed[: arguments.num_negatives]]
        if not texts and arguments.drop_without_negatives:
            continue
        found = next(kept)
        assert found.get("neg_doc", []) == texts
        assert found["pos_score"] == pytest.approx(positive_score, rel=1e-6)
        assert found.get("neg_scores", [])[len(own) :] == pytest.approx(
            [score for _, score in allowed[: arguments.num_negatives]], rel=1e-6
        )
        assert len(found.get("neg_scores", [])) == len(texts)
        changed = ("neg_doc", "neg_scores", "pos_score")
        assert [(k, v) for k, v in found.items() if k not in changed] == [
            (k, v) for k, v in record.items() if k not in changed
        ]
    assert next(kept, None) is None
    assert {name: summary["dropped"][name] for name in totals} == totals
    fewer = [allowed for allowed, _, _ in expected if len(allowed) < arguments.num_negatives]
    assert summary["records_with_fewer"] == len(fewer) and summary["records_written"] == len(mined)
    if rule == "many":
        assert 0 < len(mined) < len(records)  # some were left without, and dropped
    assert (root / f"{rule}.jsonl.scores.png").read_bytes().startswith(b"\x89PNG")


def test_random_sampling_takes_allowed_ones_by_seed_and_record(place):
    root, records, query_vectors, document_vectors = place
    settings = {"num_negatives": 3, "embeddings": str(root / "vectors"), "relative_margin": 0.05, "sampling": "random"}
    arguments = MiningArguments(train_files=[str(root / "train.jsonl")], output_file="x", **settings)
    expected = reference(records, query_vectors, document_vectors, arguments)
    drawn = {seed: run(root, f"random{seed}.jsonl", seed=seed, **settings)[0] for seed in (1, 2)}
    for mined in drawn.values():
        for found, (allowed, _, _) in zip(mined, expected):
            places = [[text for text, _ in allowed].index(text) for text in found.get("neg_doc", [])]
            assert places == sorted(set(places)) and len(places) == min(3, len(allowed))
    assert drawn[1] != drawn[2]
    # Two records of one query draw differently: the seed is mixed with the record.
    by_query = collections.defaultdict(set)
    for record in drawn[1]:
        by_query[record["query"]].add(str(record.get("neg_doc")))
    assert max(map(len, by_query.values())) > 1


def test_planted_false_negatives_do_not_survive(tmp_path, caplog):
    """Reworded copies of the positive score about as high: a relative margin of 0.05 keeps them out."""
    rng = np.random.default_rng(3)
    documents, queries, records = {}, {}, []
    for i in range(30):
        positive = unit(rng.standard_normal(16))
        documents[f"d{i}"], queries[f"q{i}"] = positive, unit(positive + 0.05 * rng.standard_normal(16))
        documents[f"copy{i}"] = unit(positive + 0.002 * rng.standard_normal(16))
        records.append({"query": f"query {i}", "query_id": f"q{i}", "pos_doc": f"text {i}", "doc_id": f"d{i}"})
    write_jsonl(tmp_path / "train.jsonl", records)
    corpus = [
        {"pos_doc": f"text {name}" if "copy" in name else f"text {name[1:]}", "doc_id": name} for name in documents
    ]
    write_jsonl(tmp_path / "docs.jsonl", corpus)
    write_vectors(tmp_path / "vectors", queries, documents)
    settings = {
        "embeddings": str(tmp_path / "vectors"),
        "doc_files": [str(tmp_path / "docs.jsonl")],
        "num_negatives": 3,
    }
    naive, _ = run(tmp_path, "naive.jsonl", **settings)
    assert sum(f"text copy{i}" in record["neg_doc"] for i, record in enumerate(naive)) == 30
    guarded, summary = run(tmp_path, "guarded.jsonl", relative_margin=0.05, **settings)
    assert not any(f"text copy{i}" in record["neg_doc"] for i, record in enumerate(guarded))
    assert summary["dropped"]["relative_margin"] >= 30 and summary["records_without_negatives"] == 0
    assert "warning" not in caplog.text
    strict, _ = run(tmp_path, "strict.jsonl", relative_margin=2.0, drop_without_negatives=True, **settings)
    assert (
        not strict
        and "30 of 30 records have no negative and were left out; the rule relative_margin took" in caplog.text
    )


def test_documents_of_their_own_files_and_of_negatives(place, tmp_path):
    root, records, query_vectors, document_vectors = place
    corpus = [(f"only here {i}", f"d{i}") for i in range(3, 30)] + [("  ", "d1"), ("ONLY here 5", "d2")]
    write_jsonl(root / "docs.jsonl", [{"pos_doc": text, "doc_id": doc_id} for text, doc_id in corpus])
    settings = {"embeddings": str(root / "vectors"), "doc_files": [str(root / "docs.jsonl")], "num_negatives": 5}
    mined, summary = run(root, "own.jsonl", **settings)
    arguments = MiningArguments(train_files=[str(root / "train.jsonl")], output_file="x", **settings)
    expected = reference(records, query_vectors, document_vectors, arguments, corpus[:-2] + corpus[-1:])
    assert [r["neg_doc"] for r in mined] == [[text for text, _ in allowed[:5]] for allowed, _, _ in expected]
    assert (summary["candidates"], summary["blank_documents"], summary["repeated_documents"]) == (27, 1, 1)
    _, with_negatives = run(root, "neg.jsonl", method="bm25", include_neg_docs=True, match_positives="exact")
    _, without = run(root, "pos.jsonl", method="bm25", match_positives="exact")
    texts = {record["pos_doc"] for record in records}
    negatives = {
        t for r in records for t in ([r["neg_doc"]] if isinstance(r.get("neg_doc"), str) else r.get("neg_doc", []))
    }
    assert (with_negatives["candidates"], without["candidates"]) == (len(texts | negatives), len(texts))


def test_bm25_candidates_equal_its_formula(tmp_path):
    make_training_file(tmp_path / "train.jsonl", 120, num_negatives=0, seed=3)
    records = read_jsonl(tmp_path / "train.jsonl")
    mined, _ = run(tmp_path, "bm25.jsonl", method="bm25", num_negatives=6)
    words = [same(record["pos_doc"]).split() for record in records]
    mean = np.mean([len(w) for w in words])
    counts = [collections.Counter(w) for w in words]
    df = collections.Counter(word for w in words for word in set(w))

    def score(query, i):
        total = 0.0
        for word in same(query).split():
            idf = math.log(1 + (len(words) - df[word] + 0.5) / (df[word] + 0.5))
            tf = counts[i][word]
            total += idf * tf / (tf + 1.5 * (0.25 + 0.75 * len(words[i]) / mean))
        return total

    for number, (record, found) in enumerate(zip(records, mined)):
        scores = {r["pos_doc"]: score(record["query"], i) for i, r in enumerate(records) if i != number}
        best = sorted((s for s in scores.values() if s > 0), reverse=True)[:6]
        assert found["neg_scores"] == pytest.approx(best, rel=1e-4)
        assert [scores[text] for text in found["neg_doc"]] == pytest.approx(best, rel=1e-4)
        assert found["pos_score"] == pytest.approx(score(record["query"], number), rel=1e-4)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny encoder, cross-encoders with one and two labels, and their training file."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    root = tmp_path_factory.mktemp("models")
    make_model(root / "bert", "bert")
    for labels in (1, 2):
        torch.manual_seed(labels)
        config = BertConfig(
            vocab_size=100,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=64,
            num_labels=labels,
            initializer_range=0.3,
        )
        BertForSequenceClassification(config).save_pretrained(root / f"cross{labels}")
        make_tokenizer(root / f"cross{labels}", bert=True)
    make_training_file(root / "train.jsonl", 150, num_negatives=1, seed=8)
    return root


@pytest.mark.parametrize("labels", [1, 2])
def test_cross_encoder_orders_judges_and_teaches(models, labels):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = models / f"cross{labels}"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    judge = AutoModelForSequenceClassification.from_pretrained(folder).eval()

    def score(query, document):
        inputs = tokenizer(query, document, return_tensors="pt", truncation="longest_first", max_length=64)
        with torch.no_grad():
            logits = judge(**inputs).logits[0]
        logit = logits[0] if labels == 1 else logits[1] - logits[0]
        return float(logit if labels == 1 else logit.sigmoid())

    settings = {
        "cross_encoder": str(folder),
        "range_max": 12,
        "num_negatives": 3,
        "method": "bm25",
        "keep_existing": True,
    }
    if labels == 2:
        settings["cross_encoder_scores"] = "probability"
    judged, _ = run(models, f"judged{labels}.jsonl", relative_margin=0.1, **settings)
    pools, _ = run(models, f"pool{labels}.jsonl", method="bm25", range_max=12, num_negatives=12, keep_existing=True)
    for record, pool in list(zip(judged, pools))[:25]:
        lowest = score(record["query"], record["pos_doc"])
        own = read_jsonl(models / "train.jsonl")[int(record["query_id"][1:])]["neg_doc"]
        scored = [(score(record["query"], text), text) for text in pool["neg_doc"][len(own) :]]
        allowed = sorted((p for p in scored if p[0] <= lowest - abs(lowest) * 0.1), reverse=True)[:3]
        assert record["neg_doc"] == own + [text for _, text in allowed]
        assert record["pos_score"] == pytest.approx(lowest, abs=2e-5)
        expected = [score(record["query"], text) for text in record["neg_doc"]]
        assert record["neg_scores"] == pytest.approx(expected, abs=2e-5)


def test_training_with_a_teacher_accepts_the_output(models):
    run(models, "taught.jsonl", method="bm25", cross_encoder=str(models / "cross1"), drop_without_negatives=True)
    result = launch(
        0,
        "recipes/train_bert.py",
        "--deepspeed",
        "ds_configs/zero1.json",
        "--model_name_or_path",
        models / "bert",
        "--train_files",
        models / "taught.jsonl",
        "--output_dir",
        models / "run",
        "--cache_dir",
        models / "cache",
        "--max_length",
        32,
        "--global_batch_size",
        8,
        "--hard_negatives",
        2,
        "--max_steps",
        2,
        "--distillation_weight",
        1,
        "--report_to",
        "none",
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert len(read_jsonl(models / "run" / "metrics.jsonl")) == 2


def two_files(root, mark):
    """Eight queries on two topics, each file numbered from 0 unless `mark` makes the ids distinct."""
    paths = []
    for topic, other in (("rivers", "water"), ("cooking", "soup")):
        records = [
            {
                "query": f"{topic} {n}",
                "pos_doc": f"{topic} {other} {n}",
                "query_id": f"{topic * mark}{n}",
                "doc_id": f"{topic * mark}{n}",
            }
            for n in range(4)
        ]
        paths.append(str(root / f"{topic}-{mark}.jsonl"))
        write_jsonl(root / f"{topic}-{mark}.jsonl", records)
    return paths


def test_ids_count_within_their_file(tmp_path):
    """Both files number from 0: what is mined is what distinct ids give, and no stranger's positive is excluded."""
    settings = dict(method="bm25", num_negatives=6, relative_margin=0.05)
    mined = [run(tmp_path, f"{mark}.jsonl", train_files=two_files(tmp_path, mark), **settings)[0] for mark in (0, 1)]
    assert [record["neg_doc"] for record in mined[0]] == [record["neg_doc"] for record in mined[1]]
    assert len(mined[0]) == 8 and any(record["neg_doc"] for record in mined[0])
    everything, _ = run(tmp_path, "all.jsonl", train_files=two_files(tmp_path, 0), method="bm25", num_negatives=6)
    for record in everything:
        topic = record["query"].split()[0]
        assert sum(text.startswith(topic) for text in record["neg_doc"]) == 3  # all of the topic but its own
    assert "cooking soup 0" in everything[0]["neg_doc"] + everything[1]["neg_doc"]


def test_one_vector_for_two_texts_of_two_files_is_refused(tmp_path):
    write_vectors(tmp_path / "vectors", {str(n): np.ones(2) for n in range(4)}, {str(n): np.ones(2) for n in range(4)})
    with pytest.raises(
        ValueError, match="cooking-0.jsonl:1: (query|doc)_id '0' stands in .*rivers-0.jsonl for another"
    ):
        run(
            tmp_path,
            "out.jsonl",
            train_files=two_files(tmp_path, 0),
            embeddings=str(tmp_path / "vectors"),
            num_negatives=1,
        )


def test_documents_of_the_same_tokens_are_one(tmp_path):
    """What differs only behind the cut, in case or in a letter that no token has, is one to the model, as in training."""
    make_model(tmp_path / "bert", "bert")
    long = "w1 w2 w3 w4 w5 w6 w7 w8 w9"
    texts = [f"{long} ending", f"{long} otherwise", "w11 w12", "w13 w14", "w15 w16", "w17 w18"]
    records = [{"query": f"w{i}", "pos_doc": text} for i, text in enumerate(texts)]
    records += [{"query": "w20 w21 w22 w23 w24 w25 w26 w27 a", "pos_doc": "w30"}]
    records += [{"query": "w20 w21 w22 w23 w24 w25 w26 w27 b", "pos_doc": "w31"}]
    write_jsonl(tmp_path / "train.jsonl", records)
    text = TextArguments(max_length=8)
    mined, summary = run(tmp_path, "m.jsonl", model=tmp_path / "bert", text=text, num_negatives=4, bf16=False)
    assert (summary["candidates"], summary["repeated_documents"]) == (7, 1)
    for record in mined[:2]:
        assert not any(negative.startswith(long) for negative in record["neg_doc"])
    for record in mined[-2:]:  # their queries are one, so that both documents are positives of each
        assert {"w30", "w31"}.isdisjoint(record["neg_doc"])
    by_text, summary = run(tmp_path, "t.jsonl", method="bm25", num_negatives=4)
    assert summary["candidates"] == 8
