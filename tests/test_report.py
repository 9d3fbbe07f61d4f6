"""recipes/report.py on a real run; what its charts and tables are made of; mistakes that it names."""

import json
import re

import numpy as np
import pytest
from report_material import report, write_retrieval, write_run
from tiny import check, launch, make_model, make_training_file

from ds_embed.job.ranks import World
from ds_embed.settings import EncodeArguments, ModelArguments, TextArguments
from ds_embed.tools.report.answers import find_answers, map_documents, sample_documents, worst_queries
from ds_embed.tools.report.charts import draw_curves, smooth
from ds_embed.tools.report.run_log import read_run
from ds_embed.vectors.generate import generate
from ds_embed.vectors.vectors import read_embeddings


def test_report_of_a_real_run(tmp_path, capsys):
    from safetensors.torch import load_file

    model = make_model(tmp_path / "bert", "bert")
    data = make_training_file(tmp_path / "train.jsonl", 40)
    run = tmp_path / "RUN"
    check(
        launch(
            0,
            "recipes/train_bert.py",
            "--deepspeed",
            "ds_configs/zero2.json",
            "--model_name_or_path",
            model,
            "--train_files",
            data,
            "--output_dir",
            run,
            "--cache_dir",
            tmp_path / "cache",
            "--global_batch_size",
            4,
            "--max_steps",
            6,
            "--max_length",
            32,
        )
    )
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "data" in line] == [1]
    lines[4]["data"] = lines[0]["data"]  # as a second start writes it
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = check(launch(0, "recipes/report.py", run))
    assert f"written to {run}/report/report.html" in result.stdout and "8 charts" in result.stdout
    page = (run / "report" / "report.html").read_text(encoding="utf-8")
    for name in ("loss", "accuracy", "learning_rate", "grad_norm", "tokens_per_second", "padding_share", "seconds"):
        assert (run / "report" / f"{name}.png").read_bytes().startswith(b"\x89PNG"), name
    shown = dict(re.findall(r'<th scope="row">(.*?)</th><td>(.*?)</td>', page))
    assert shown["Steps"] == "6 of 6" and shown["Samples"] == "24" and shown["Restarted at step"] == "5"
    assert shown["Ranks and ZeRO"] == "1 rank(s), ZeRO-2" and shown["Training files"] == str(data)
    assert f"{data}: " in page and " cut at " in page  # what was read of it
    weights = load_file(run / "model" / "model.safetensors")
    assert shown["Trained weights"] == f"all: {sum(w.numel() for w in weights.values()):,} parameters"
    assert "No retrieval was measured: set --val_check_interval" in page
    assert "No vectors: give --embeddings" in page

    # Vectors of the run's model, and of another: said on the page and where the command runs.
    names = [{"query": f"w{i}", "query_id": f"q{i}", "doc_id": f"d{i}"} for i in range(9)]
    texts = [{"pos_doc": f"w{i} w{i + 1}", "doc_id": f"d{i}"} for i in range(9)]
    for name, lines in (("q.jsonl", names), ("d.jsonl", texts)):
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = {"query_files": [str(tmp_path / "q.jsonl")], "doc_files": [str(tmp_path / "d.jsonl")]}
    for encoded_by in (run, model):
        options = {"output_prefix": str(tmp_path / encoded_by.name), "cache_dir": str(tmp_path / "cache")}
        arguments = EncodeArguments(**files, **options)
        folder = generate(World.alone(), ModelArguments(str(encoded_by)), TextArguments(), arguments)
        capsys.readouterr()
        page = report(run, embeddings=str(folder), **files)
        warning = f"The vectors are not those of {run}/model, but of another model or a checkpoint (base_model "
        assert (warning in page) == (f"warning: {warning}" in capsys.readouterr().err) == (encoded_by == model)


def test_found_documents_agree_with_brute_force(tmp_path):
    write_retrieval(tmp_path)
    queries, documents = read_embeddings(tmp_path)
    # Right are the query's own document and the next, but for q0; q39 is judged and has no right document.
    qrels = {f"q{i}": {f"d{i}": 1, f"d{i + 1}": 2, f"d{i + 2}": 0} for i in range(30)} | {"q39": {"d39": 0}}
    qrels["q0"]["d1"] = 0
    found = find_answers(queries, documents, qrels, "here", seed=1)
    scores = queries.rows[:30].astype(np.float64) @ documents.rows.T.astype(np.float64)
    right = np.array([0] + [max((i, i + 1), key=lambda row: scores[i, row]) for i in range(1, 30)])
    assert found.query_ids == [f"q{i}" for i in range(30)] and found.num_unjudged == 10
    np.testing.assert_array_equal(found.right, right)
    own = scores[np.arange(30), right]
    np.testing.assert_array_equal(found.rank, 1 + (scores > own[:, None]).sum(axis=1))
    assert found.rank[0] == 300  # beyond what search returns: counted
    others = [np.delete(scores[i], [i, i + 1] if i else [0]) for i in range(30)]
    np.testing.assert_allclose(found.right_score, own, atol=1e-6)
    np.testing.assert_allclose(found.hardest_score, [row.max() for row in others], atol=1e-6)
    assert set(np.round(found.random_score, 5)) <= set(np.round(np.concatenate(others), 5).astype(np.float32))
    assert found.score_name == "cosine" and worst_queries(found, 3)[0] == 0
    worst = worst_queries(found, 30)
    assert len(worst) == (found.rank > 1).sum() and (np.diff(found.rank[worst]) <= 0).all()


def test_map_keeps_distances_or_neighbours(tmp_path):
    rng = np.random.default_rng(0)
    flat = rng.normal(size=(50, 2))
    basis = np.linalg.qr(rng.normal(size=(8, 2)))[0]
    points, how = map_documents((flat @ basis.T + 3).astype(np.float32), "pca", seed=0)
    distances = [np.linalg.norm(p[:, None] - p[None], axis=-1) for p in (flat, points)]
    np.testing.assert_allclose(*distances, atol=1e-5)
    assert "100% of the variance" in how
    clusters = np.repeat(np.arange(3), 20)
    rows = (np.eye(8)[clusters] + 0.05 * rng.normal(size=(60, 8))).astype(np.float32)
    points, _ = map_documents(rows, "tsne", seed=0)
    nearest = np.linalg.norm(points[:, None] - points[None] + 1e9 * np.eye(60)[..., None], axis=-1).argmin(axis=1)
    assert (clusters[nearest] == clusters).mean() > 0.95
    write_retrieval(tmp_path)
    qrels = {f"q{i}": {f"d{i}": 1} for i in range(40)}
    found = find_answers(*read_embeddings(tmp_path), qrels, "here", seed=1)
    rows = sample_documents(found, 50, seed=3)
    assert len(set(rows)) == 50 and (rows < 40).sum() == 25 and (np.diff(rows) > 0).all()
    assert (rows == sample_documents(found, 50, seed=3)).all() and (rows != sample_documents(found, 50, seed=4)).any()
    assert len(sample_documents(found, 1000, seed=3)) == 300


def test_running_mean():
    values = np.array([4.0, 0.0, 2.0, 6.0, 1.0])
    np.testing.assert_allclose(smooth(values, 3), [2, 2, 8 / 3, 3, 3.5])
    np.testing.assert_allclose(smooth(values, 1), values)


def test_compare_lays_another_run_over(tmp_path):
    run = write_run(tmp_path / "first", 40, validated=(40,))
    other = write_run(tmp_path / "second", 50)
    page = report(run, compare=str(other), output_dir=str(tmp_path / "page"))
    assert "<td>0.3333</td><td>–</td>" in page  # validation, which the other has not
    curves = {chart.name: chart.axes for chart in draw_curves("training", read_run(run), read_run(other))}
    drawn = {line.get_label(): (line.get_xdata()[-1], line.get_linestyle()) for line in curves["grad_norm"].lines}
    assert drawn["first"] == (40, "-") and drawn["second"] == (50, "--")
    assert [line.get_label() for line in curves["loss"].lines if line.get_marker() == "o"] == ["validation, first"]
    assert (tmp_path / "page" / "loss.png").is_file() and not (run / "report").exists()


def test_vectors_of_the_run_s_own_validation(tmp_path):
    run = write_run(tmp_path / "run", 0)
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    kept = write_retrieval(run / "validation" / "consumed_samples1000", num_queries=7)
    write_retrieval(run / "validation" / "consumed_samples200")
    files = {"val_query_files": kept["query_files"], "val_doc_files": kept["doc_files"]}
    (run / "config.yaml").write_text(json.dumps(files))
    page = report(run)
    assert "7 queries searched in 300 documents" in page and "validation/consumed_samples1000" in page
    (run / "config.yaml").write_text(json.dumps(files | {"val_doc_files": ["gone.jsonl"]}))
    assert "validation file gone.jsonl is not there" in report(run)


DAMAGES = {
    "empty": ("", r"metrics\.jsonl: holds no training step"),
    "cut": ('{"step": 1, "loss": 2.0}\n{"step": 2, "lo', r"metrics\.jsonl:2: not a line of JSON"),
    "no step": ('{"loss": 2.0}\n', r"metrics\.jsonl:1: no object with a whole number 'step'"),
    "binary": (b"\xff\xfe\x00", r"metrics\.jsonl:1: not a line of JSON"),
    "validation only": ('{"step": 0, "val_loss": 2.0}\n', r"metrics\.jsonl: holds no training step"),
    "two runs": ('{"step": 2, "loss": 1}\n{"step": 1, "loss": 1}\n', r"metrics\.jsonl:2: step 1 stands after step 2"),
    "none": (None, r"metrics\.jsonl: no such file"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_log_is_named(name, tmp_path):
    content, message = DAMAGES[name]
    path = write_run(tmp_path / "run", 5) / "metrics.jsonl"
    path.unlink() if content is None else path.write_bytes(content if type(content) is bytes else content.encode())
    with pytest.raises(ValueError, match=message):
        report(path.parent)
    assert not (path.parent / "report").exists()


def test_other_mistakes_are_named(tmp_path):
    run = write_run(tmp_path / "run", 5)
    flags = write_retrieval(tmp_path / "OUT")
    with pytest.raises(ValueError, match="--run .*nowhere: no such folder"):
        report(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="give --query_files or --qrels"):
        report(run, embeddings=flags["embeddings"])
    with pytest.raises(ValueError, match="--doc_files: has no use without vectors"):
        report(run, doc_files=flags["doc_files"])
    with pytest.raises(ValueError, match="--map umap: choose one of pca, tsne"):
        report(run, map="umap")
    (run / "config.yaml").write_text("a: [")
    with pytest.raises(ValueError, match=r"config\.yaml: can't be read"):
        report(run)
